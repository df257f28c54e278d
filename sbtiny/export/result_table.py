"""Print the result of an export as a table."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("MB", "KL", "1st choice %", "form %", "in 50 %", "right %", "tokens", "ended %")
READERS = {"transformers": "transformers", "llama_cpp": "llama.cpp"}


def table(result: dict[str, Any]) -> None:
    console = Console()
    if result["checked"]:
        grid = Table("", *COLUMNS, box=None, header_style="bold", pad_edge=False)
        grid.columns[0].no_wrap = True
        for column in grid.columns[1:]:
            column.justify = "right"
        for name, cells in table_rows(result):
            grid.add_row(name, *cells)
        console.print(grid)
    console.print(f"in {result['folder']}: README.md says how to run it", soft_wrap=True)
    if "pushed" in result:
        console.print(f"pushed to {result['pushed']}", soft_wrap=True)


def table_rows(result: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A row for the trained policy, for the merged folder, and for each file in each reader."""
    yield "trained policy", ["", "", "", *budget_cells(result["trained"])]
    merged = result["merged"]
    yield "merged", ["", f"{merged['kl_adapter_merged']:.0e}", f"{100 * merged['argmax_agreement']:.2f}", *[""] * 5]
    for file in result.get("files", {}).values():
        if not file["checked"]:
            yield f"{file['kind']} not checked", [f"{file['bytes'] / 1e6:,.1f}", *[""] * 7]
        for reader in READERS:
            if found := file[reader]:
                size = f"{file['bytes'] / 1e6:,.1f}" if reader == "transformers" or not file["transformers"] else ""
                near = [f"{found['kl']:.0e}", f"{100 * found['argmax_agreement']:.2f}"]
                yield f"{file['kind']} {READERS[reader]}", [size, *near, *budget_cells(found.get("budget"))]


def budget_cells(metrics: dict[str, Any] | None) -> list[str]:
    if not metrics:
        return [""] * 5
    shares = [metrics["format_rate"], (metrics["within"] or {}).get("0.5"), metrics["accuracy"]]
    return [*("–" if x is None else f"{100 * x:.1f}" for x in shares), f"{metrics['mean_tokens']:.1f}", f"{100 * metrics['ended']:.1f}"]
