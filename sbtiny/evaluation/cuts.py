"""Accuracy of answers that are cut below their budget, wrapped up, and finished in a few more tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sbtiny.rollout.episode import Episode

CUT_SHARES = (0.75, 0.5, 0.25)  # shares of the stated budget
UNCUT_BUDGET = "1x"  # the stated budget, prefilled as in cut answers, so that uncut answers are the same but for the cut
EvaluateCut = Callable[[float], tuple[dict[str, Any], Sequence[Episode]]]  # share, 0 for no cut -> evaluation and its episodes


def evaluate_cuts(one: EvaluateCut) -> list[dict[str, Any]]:
    """Compute the content of cuts.json: uncut first, then each share. `cut_rate` is the share of answers that were cut."""
    rows = []
    for share in (0.0, *CUT_SHARES):
        result, episodes = one(share)
        cut = sum(True in e.injected for e in episodes) / len(episodes)
        rows.append(result | {"cut_rate": cut})
    return rows


def print_cuts_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of `evaluate_cuts` to stdout."""
    table = Table("cut at", "accuracy", "95 %", "tokens", "answers cut", "well formed", box=None, header_style="bold")
    for row in rows:
        low, high = row["accuracy_ci95"]
        table.add_row(
            f"{row['cut']:.0%} of its budget" if row["cut"] else "not at all",
            f"{row['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['mean_tokens']:.1f}",
            f"{row['cut_rate']:.0%}",
            f"{row['format_rate']:.1%}",
        )
    Console().print(table)
