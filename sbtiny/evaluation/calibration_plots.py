"""The plots of a calibration: promised against kept coverage, and tokens used against the stated budget with the promise as a line.

`calibration_panels` builds them for a report; a panel is drawn by `plots.to_png` and `plots.to_svg` as any other.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from sbtiny.budget.calibration import Calibration
from sbtiny.evaluation.plots import COLOURS, INK, MOST_MARKS, MUTED, TICKS, Panel, short_name

Row = dict[str, Any]
DRAWN_COVERAGE = 0.9  # of the line of promises
SHADE = 0.1
LEAST_AREA, MOST_AREA = 5.0, 200.0  # of a mark, whose area is its number of answers; square points


def calibration_panels(calibration: Calibration, evaluation: Row, samples: Sequence[Row], stage: str = "grpo") -> list[Panel]:
    """Build the panels of one calibrated stage; none where its eval.json has no coverage.

    `evaluation`: the content of eval.json. `samples`: the rows of eval_samples.jsonl. `stage`: a key of COLOURS.
    """
    coverage = {key: row for key, row in (evaluation.get("coverage") or {}).items() if row.get("kept") is not None}
    if not coverage:
        return []
    budgeted = [row for row in samples if row.get("budget") and row.get("ok")]
    reliability = partial(draw_reliability, coverage, calibration.scores.ranges(), COLOURS[stage])
    panels = [Panel("promised and kept", (4.2, 4.4), reliability)]
    if budgeted:
        panels.append(Panel("stated, used and promised", (4.2, 4.4), partial(draw_promise, calibration, budgeted, COLOURS[stage])))
    return panels


def draw_reliability(coverage: dict[str, Row], ranges: dict[str, list[float] | None], colour: str, ax: Axes) -> None:
    """Plot kept against promised coverage: of all answers, and hollow by bin. Bars: the 5 to 95 % range that chance allows."""
    low = min([0.7, *(b["kept"] for row in coverage.values() for b in row["by_bin"] if b["kept"] is not None)])
    edges = (max(0.0, low - 0.02), 1.01)
    ax.plot(edges, edges, color=MUTED, linewidth=0.8)
    for key, row in coverage.items():
        promised = float(key)
        if ranges.get(key):
            ax.plot([promised] * 2, ranges[key], color=INK, alpha=0.25, linewidth=7, solid_capstyle="butt")
        by_bin = [b["kept"] for b in row["by_bin"] if b["kept"] is not None]
        ax.plot([promised] * len(by_bin), by_bin, "o", color=colour, markerfacecolor="none", markersize=5, alpha=0.8)
        ax.plot(promised, row["kept"], "o", color=colour, markersize=7)
    ax.text(0.98, 0.02, "bar: range by chance\nhollow: by stated budget", color=MUTED, size=8, ha="right", transform=ax.transAxes)
    ax.set(xlim=(0.74, 1.01), ylim=edges, xlabel="promised coverage", ylabel="kept coverage")
    ax.set_xticks([float(key) for key in coverage])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def draw_promise(calibration: Calibration, rows: Sequence[Row], colour: str, ax: Axes) -> None:
    """Plot tokens used against the stated budget, logarithmic. Below the line: the promise was kept."""
    budgets, lengths = [row["budget"] for row in rows], [max(1, row["length"]) for row in rows]
    low, high = min(*budgets, *lengths) / 1.3, max(*budgets, *lengths) * 1.3
    counts = Counter(zip(budgets, lengths, strict=True))
    ax.plot((low, high), (low, high), color=MUTED, linewidth=0.8)
    marks, area = list(counts), min(9.0, MOST_AREA / max(counts.values()))
    sizes = [max(LEAST_AREA, area * counts[mark]) for mark in marks]
    ax.scatter(*zip(*marks, strict=True), sizes, colour, alpha=0.55, linewidths=0, rasterized=len(marks) > MOST_MARKS)
    stated = sorted({round(x) for x in np.geomspace(max(1.0, low), high, 400)})
    promises = [calibration.promise(x, DRAWN_COVERAGE) for x in stated]
    if None not in promises:
        ax.plot(stated, promises, color=INK, linewidth=1.4)
        ax.fill_between(stated, low, promises, color=INK, alpha=SHADE, linewidth=0)
        note = f"line: promise at {DRAWN_COVERAGE:.0%}".replace("%", " %")
        ax.text(0.98, 0.02, note, color=MUTED, size=8, ha="right", transform=ax.transAxes)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel="stated budget, tokens", ylabel="tokens used")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set(major_locator=FixedLocator(TICKS), minor_locator=NullLocator(), major_formatter=FuncFormatter(short_name))
