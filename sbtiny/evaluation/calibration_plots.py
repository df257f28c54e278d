"""The plots of what a budget is worth: coverage promised and kept, tokens against the promise, accuracy of interrupted answers."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, PercentFormatter

from sbtiny.budget.calibration import Calibration
from sbtiny.evaluation.plots import COLOURS, INK, MUTED, STYLE, add_legend, plot_answers, plot_bands
from sbtiny.evaluation.report import Eval, ReportData, Row, measures_coverage_of

DRAWN_COVERAGE = 0.9  # of the line of promises


@matplotlib.rc_context(STYLE)
def draw_promise_figures(evidence: ReportData) -> dict[str, Figure | None]:
    """Draw the calibration and the interruption curve of a run, by name; None where the run lacks the data."""
    stage = evidence.last_stage
    return {
        "calibration": draw_calibration(evidence.calibration, evidence.evals[stage], evidence.samples[stage], COLOURS[stage]),
        "interruption": draw_interruption(evidence.cuts, COLOURS[stage]),
    }


def draw_calibration(calibration: Calibration | None, evaluation: Eval, samples: Sequence[Row], colour: str) -> Figure | None:
    """Draw kept against promised coverage, and tokens used against stated budgets; None where nothing is promised."""
    if calibration is None or not measures_coverage_of(calibration, evaluation):
        return None
    coverage = {float(key): row for key, row in evaluation["coverage"].items() if row["kept"] is not None}
    if not coverage:
        return None
    figure = Figure((8.4, 4))
    left, right = figure.subplots(1, 2)
    plot_reliability(coverage, calibration.scores.kept_ranges(evaluation["questions"]), colour, left)
    plot_promise(calibration, [row for row in samples if row["budget"] and row["ok"]], colour, right)
    return figure


def plot_reliability(coverage: dict[float, Row], ranges: dict[str, list[float] | None], colour: str, ax: Axes) -> None:
    """Plot kept against promised coverage: of all answers, and hollow by bin. Bars: its 5 to 95 % range by chance."""
    by_bin = [(promised, b["kept"]) for promised, row in coverage.items() for b in row["by_bin"] if b["kept"] is not None]
    lowest = [*(row["kept"] for row in coverage.values()), *(kept for _, kept in by_bin), *(edges[0] for edges in ranges.values() if edges)]
    low = max(0.0, min(0.7, *lowest) - 0.02)
    ax.plot((low, 1.01), (low, 1.01), color=MUTED, linewidth=0.8)
    for promised, row in coverage.items():
        if ranges[str(promised)]:
            ax.plot([promised] * 2, ranges[str(promised)], color=INK, alpha=0.25, linewidth=7, solid_capstyle="butt")
        ax.plot(promised, row["kept"], "o", color=colour, markersize=7)
    ax.plot(*zip(*by_bin, strict=True) if by_bin else ([], []), "o", color=colour, markerfacecolor="none", markersize=5, alpha=0.8)
    ax.set(xlim=(0.74, 1.01), ylim=(low, 1.01), xlabel="promised coverage", ylabel="kept coverage")
    ax.set_xticks(list(coverage))
    for axis in (ax.xaxis, ax.yaxis):
        set_percent_ticks(axis)


def plot_promise(calibration: Calibration, rows: Sequence[Row], colour: str, ax: Axes) -> None:
    """Plot tokens used against stated budgets, and the promise as a line: below it the promise was kept."""
    sizes = [size for row in rows for size in (row["budget"], max(1, row["length"]))] or [1, 1000]
    low, high = min(sizes) / 1.3, max(sizes) * 1.3
    plot_bands(low, high, ax)
    if rows:
        plot_answers(rows, None, colour, ax)
    stated = sorted({round(x) for x in np.geomspace(max(1.0, low), high, 400)})
    promises = [calibration.promise(x, DRAWN_COVERAGE) for x in stated]
    if None not in promises:
        ax.plot(stated, promises, color=INK, linewidth=1.4, label=f"promise at {100 * DRAWN_COVERAGE:.0f} %")
        ax.legend(loc="lower right")


def draw_interruption(cuts: Sequence[Eval], colour: str) -> Figure | None:
    """Draw accuracy against the share of its budget at which an answer is stopped: by a plain cut, and by a wrap-up."""
    stopped = sorted((e for e in cuts if e["cut"]), key=lambda e: e["cut"])
    if not stopped:
        return None
    shares = [e["cut"] for e in stopped]
    figure = Figure((6.4, 3.4))
    ax = figure.subplots()
    for e in cuts:
        if not e["cut"]:
            ax.axhline(e["accuracy"], color=MUTED, linewidth=1, linestyle="--", label="not stopped")
    for name, tint, evals in (("wrapped up", colour, stopped), ("plain cut", INK, [e["plain"] for e in stopped])):
        ax.vlines(shares, *zip(*(e["accuracy_ci95"] for e in evals), strict=True), color=tint, alpha=0.4)
        ax.plot(shares, [e["accuracy"] for e in evals], "o-", color=tint, label=name)
    ax.set(xlabel="stopped at this share of its own budget", ylabel="accuracy", xlim=(0, 1.05), ylim=(-0.02, 1.02))
    ax.xaxis.set_major_locator(FixedLocator(shares))
    for axis in (ax.xaxis, ax.yaxis):
        set_percent_ticks(axis)
    add_legend(ax)
    return figure


def set_percent_ticks(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
