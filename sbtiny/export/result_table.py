"""The result of an export as a person reads it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("MB", "KL", "1st choice %", "form %", "in 50 %", "right %", "tokens", "ended %")
READERS = {"transformers": "transformers", "llama_cpp": "llama.cpp"}


def table(result: dict[str, Any]) -> None:
    console = Console()
    if result["checked"]:
        shown = Table("", *COLUMNS, box=None, header_style="bold", pad_edge=False)
        shown.columns[0].no_wrap = True
        for column in shown.columns[1:]:
            column.justify = "right"
        for name, cells in lines(result):
            shown.add_row(name, *cells)
        console.print(shown)
    console.print(f"in {result['folder']}: README.md says how to run it", soft_wrap=True)


def lines(result: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """One line for the trained policy, the merged folder, and each file as each reader has it."""
    yield "trained policy", ["", "", "", *budget(result["trained"])]
    merged = result["merged"]
    yield "merged", ["", f"{merged['kl_adapter_merged']:.0e}", f"{100 * merged['argmax_agreement']:.2f}", *[""] * 5]
    for file in result.get("files", {}).values():
        if not file["checked"]:
            yield f"{file['kind']} not checked", [f"{file['bytes'] / 1e6:,.1f}", *[""] * 7]
        for reader in READERS:
            if found := file[reader]:
                size = f"{file['bytes'] / 1e6:,.1f}" if reader == "transformers" or not file["transformers"] else ""
                near = [f"{found['kl']:.0e}", f"{100 * found['argmax_agreement']:.2f}"]
                yield f"{file['kind']} {READERS[reader]}", [size, *near, *budget(found.get("budget"))]


def budget(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return [""] * 5
    shares = [found["format_rate"], (found["within"] or {}).get("0.5"), found["accuracy"]]
    return [*("–" if x is None else f"{100 * x:.1f}" for x in shares), f"{found['mean_tokens']:.1f}", f"{100 * found['ended']:.1f}"]
