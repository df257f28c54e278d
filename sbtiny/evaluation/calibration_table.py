"""What `sbtiny calibrate` prints: the promises, the bins, and what is not promised."""

from typing import Any

from rich.console import Console
from rich.table import Table

from sbtiny.budget.conformal import COVERAGES, promise_rank


def print_calibration(record: dict[str, Any]) -> None:
    """Print the promises, the bins, and what cannot be promised, to stdout."""
    out, median = Console(), record["median_stated"]
    out.print(promise_table(record, median))
    if record["by_bin"]:
        out.print()
        out.print(bin_table(record))
    for line in shortfalls(record):
        out.print(line, markup=False, soft_wrap=True)


def promise_table(record: dict[str, Any], median: int | None) -> Table:
    promise = "promise" if median is None else f"promise for {median} stated"
    own = bool(record["by_bin"]) and record["by_bin"][0]["factors"] is not None
    table = Table(
        "asked",
        "factor of all" if own else "factor",
        f"{promise}, by its own factor" if own else promise,
        "true coverage, 5 to 95 %",
        box=None,
        header_style="bold",
    )
    for key in map(str, COVERAGES):
        factor, spread = record["factors"][key], record["true_coverage_range"][key]
        tokens = None if record["promises"] is None else record["promises"][key]
        table.add_row(
            f"{float(key):.0%}",
            "none" if factor is None else f"{factor:.2f}",
            "none" if tokens is None else f"{tokens} tokens",
            "–" if spread is None else f"{spread[0]:.1%} to {spread[1]:.1%}",
        )
    return table


def bin_table(record: dict[str, Any]) -> Table:
    """How many answers the one factor for all keeps, which shows whether a bin needs its own; and its own, where each bin has them."""
    own = record["by_bin"][0]["factors"] is not None
    keys = list(map(str, COVERAGES))
    heads = ["stated", "answers", *(f"{float(key):.0%}" for key in keys), *(f"own, {float(key):.0%}" for key in keys if own)]
    table = Table(*heads, box=None, header_style="bold", title="kept within the one factor, by stated budget", title_justify="left")
    for row in record["by_bin"]:
        kept = ["–" if row["kept"][key] is None else f"{row['kept'][key]:.1%}" for key in keys]
        factors = ["none" if row["factors"][key] is None else f"{row['factors'][key]:.2f}" for key in keys if own]
        table.add_row(f"{row['from']} to {row['to']}", str(row["questions"]), *kept, *factors)
    return table


def shortfalls(record: dict[str, Any]) -> list[str]:
    """What is not promised, and why, one line each."""
    n, bad = record["questions"], record["malformed"] + record["cut"]
    lines = [f"{n} answers, {record['malformed']} malformed, {record['cut']} cut"]
    if record["median_stated"] is None:
        return [*lines, "no promise: no answer states a budget; train one with sbtiny sft"]
    missing = [float(key) for key, factor in record["factors"].items() if factor is None]
    few = [c for c in missing if promise_rank(n, c, record["confidence"]) is None]
    reasons = (
        (few, f"{n} answers are too few; raise --limit"),
        ([c for c in missing if c not in few], f"{bad} of {n} answers are cut or malformed; train further, or raise eval.max_tokens"),
    )
    return lines + [f"no finite promise at {', '.join(f'{c:.0%}' for c in cs)}: {why}" for cs, why in reasons if cs]
