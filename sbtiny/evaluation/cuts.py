"""Accuracy when an answer is cut below the number it was to take, wrapped up, and finished in a few tokens more."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sbtiny.rollout.episode import Episode

CUTS = (0.75, 0.5, 0.25)  # shares of the model's own number
FREE = "1x"  # its own number, prefilled as it is where answers are cut: the same answers, left alone
One = Callable[[float], tuple[dict[str, Any], Sequence[Episode]]]  # a share, 0 for none -> an evaluation and its episodes


def measure(one: One) -> list[dict[str, Any]]:
    """The content of cuts.json: uncut first, then each share, with `cut_rate`, the share of answers that were in fact cut."""
    found = []
    for share in (0.0, *CUTS):
        result, episodes = one(share)
        cut = sum(True in e.injected for e in episodes) / len(episodes)
        found.append(result | {"cut_rate": cut})
    return found


def table(found: Sequence[dict[str, Any]]) -> None:
    """Print what `measure` found, to stdout."""
    drawn = Table("cut at", "accuracy", "95 %", "tokens", "answers cut", "well formed", box=None, header_style="bold")
    for each in found:
        low, high = each["accuracy_ci95"]
        drawn.add_row(
            f"{each['cut']:.0%} of its number" if each["cut"] else "not at all",
            f"{each['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{each['mean_tokens']:.1f}",
            f"{each['cut_rate']:.0%}",
            f"{each['format_rate']:.1%}",
        )
    Console().print(drawn)
