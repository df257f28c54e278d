"""The figures of a report: one drawing of each, saved as PNG and as SVG.

Colour-blind readers can tell the colours apart, as with Okabe and Ito's. In an SVG they become CSS variables, so that the page can be
dark.
"""

import io
import re
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from sbtiny.evaluation.report import STAGES, Eval, ReportData, Row, tokens

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
COLOURS = {"base": "#7d8590", "sft": "#2f81c1", "grpo": "#d1480f"}
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", **{colour: stage for stage, colour in COLOURS.items()}}
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a dollar in the name of a level is no formula
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,  # also below the marks of a scatter
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "svg.fonttype": "none",
    "svg.hashsalt": "sbtiny",  # the same run draws the same bytes
}
# Blue to amber, of medium lightness: the ends of the usual maps vanish on a dark or a light page.
LEVELS = LinearSegmentedColormap.from_list("levels", ["#5266d9", "#1f9e96", "#cf9d0c"])
MARKS = "vo^Ds"  # one for each budget of a sweep
MOST_AREA = 200.0  # of a mark, in square points
MOST_MARKS = 3000  # above this a scatter becomes an image inside the SVG
TRAINING = {
    "reward": ["reward"],
    "accuracy": ["accuracy"],
    "tokens": ["budget", "tokens"],
    "within 50 % of the budget": ["within_50"],
    "malformed": ["malformed"],
    "alpha, the width of the window": ["alpha"],
}


@matplotlib.rc_context(STYLE)
def build_figures(evidence: ReportData) -> dict[str, Figure | None]:
    """Draw each figure by name; None where the run lacks the data."""
    evals = {stage: e for stage, e in evidence.evals.items() if e}
    budgeted = {stage: [row for row in evidence.samples[stage] if row["budget"]] for stage in ("sft", "grpo")}
    return {
        "accuracy_tokens": draw_accuracy_tokens(evals, evidence.sweep),
        "predicted_used": draw_budget_length({stage: rows for stage, rows in budgeted.items() if rows}),
        "tokens_by_level": draw_tokens_by_level(evals),
        "training": draw_training(evidence.metrics),
    }


def to_png(figure: Figure) -> bytes:
    return save(figure, "png", facecolor="white")


def to_svg(figure: Figure, name: str) -> str:
    """Write a transparent <svg> element for a page. Its colours are CSS variables, its ids start with `name`."""
    text = save(figure, "svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))).decode()
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()


@matplotlib.rc_context(STYLE)
def save(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=180, **options)
    return buffer.getvalue()


def add_legend(ax: Axes) -> None:
    """Write the legend beside the axes, as points may lie anywhere in them."""
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def set_log_ticks(axis: Axis, multiples: Sequence[int]) -> None:
    """Put ticks at these multiples of the powers of ten, and write them short: 0.3, 200, 5k."""
    short = FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    axis.set(major_locator=LogLocator(subs=multiples), minor_locator=NullLocator(), major_formatter=short)


def draw_accuracy_tokens(evals: dict[str, Eval], sweep: Sequence[Eval]) -> Figure | None:
    """Draw accuracy against mean tokens of each stage and each given budget. A legend names the points, as they may coincide."""
    points = [*evals.values(), *sweep]
    if len(points) < 2:
        return None
    figure = Figure((6.4, 3.6))
    ax = figure.subplots()
    for stage, e in evals.items():
        x, colour = e["mean_tokens"], COLOURS[stage]
        ax.vlines(x, *e["accuracy_ci95"], color=colour)
        ax.plot(x, e["accuracy"], "o", color=colour, markersize=7, label=f"{STAGES[stage]}: {tokens(x)} tokens")
    plot_sweep(sweep, ax)
    edges = [edge for e in points for edge in e["accuracy_ci95"]]
    middle, half = (max(edges) + min(edges)) / 2, max(0.04, 0.68 * (max(edges) - min(edges)))
    ax.set(xlim=(0, 1.1 * max(e["mean_tokens"] for e in points)), ylim=(middle - half, middle + half))
    ax.set(xlabel="mean tokens an answer", ylabel="accuracy")
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %" if 0 <= y < 1.001 else ""))
    add_legend(ax)
    return figure


def plot_sweep(sweep: Sequence[Eval], ax: Axes) -> None:
    """Plot the run with other given budgets: hollow marks, joined in the order of their tokens."""
    colour = COLOURS["grpo"]
    ordered = sorted((e["mean_tokens"], e["accuracy"]) for e in sweep)
    ax.plot([x for x, _ in ordered], [y for _, y in ordered], color=colour, alpha=0.55, linewidth=1.2)
    for e, mark in zip(sweep, cycle(MARKS)):
        label = f"given {e.get('budget', '')}: {tokens(e['mean_tokens'])}"
        hollow = {"linestyle": "none", "color": colour, "markerfacecolor": "none", "markersize": 9.5}
        ax.plot(e["mean_tokens"], e["accuracy"], mark, label=label, **hollow)


def draw_budget_length(rows_by_stage: dict[str, list[Row]]) -> Figure | None:
    """Draw budget against length for each stage, on the same axes."""
    rows = [row for rows in rows_by_stage.values() for row in rows]
    if not rows:
        return None
    sizes = [size for row in rows for size in (row["budget"], max(1, row["length"]))]
    levels = {row["level"] for row in rows if isinstance(row.get("level"), int)}
    scale = ScalarMappable(Normalize(min(levels), max(levels)), LEVELS) if len(levels) > 1 else None
    figure = Figure((4.2 * len(rows_by_stage) + 0.8, 4))
    axes = figure.subplots(1, len(rows_by_stage), squeeze=False)[0]
    for (stage, of_stage), ax in zip(rows_by_stage.items(), axes, strict=True):
        plot_bands(min(sizes) / 1.3, max(sizes) * 1.3, ax)
        plot_answers(of_stage, scale, COLOURS[stage], ax)
        ax.set_title(STAGES[stage], color=COLOURS[stage], weight="bold")
    if scale:
        figure.colorbar(scale, ax=axes, label="level", shrink=0.6, ticks=MaxNLocator(8, integer=True))
    return figure


def plot_bands(low: float, high: float, ax: Axes) -> None:
    """Plot the diagonal and the bands around it on logarithmic axes from `low` to `high`, where a band is a strip."""
    for tolerance, shade in ((0.5, 0.07), (0.1, 0.12)):
        edges = [((1 + side * tolerance) * low, (1 + side * tolerance) * high) for side in (-1, 1)]
        ax.fill_between((low, high), *edges, color=INK, alpha=shade, linewidth=0, label=f"± {100 * tolerance:.0f} %")
    ax.plot((low, high), (low, high), color=MUTED, linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel="budget, tokens", ylabel="tokens used")
    set_log_ticks(ax.xaxis, (1, 2, 5))
    set_log_ticks(ax.yaxis, (1, 2, 5))
    ax.legend(loc="lower right")


def plot_answers(rows: Sequence[Row], scale: ScalarMappable | None, colour: str, ax: Axes) -> None:
    """Plot answers in the colours of their levels, or in `colour`. The area of a mark is its number of answers, the largest MOST_AREA."""
    counts = Counter((row["budget"], max(1, row["length"]), row.get("level")) for row in rows)
    area = min(9.0, MOST_AREA / max(counts.values()))
    for count in sorted(set(counts.values()), reverse=True):  # marks of one size share their outline in an SVG
        budgets, lengths, levels = zip(*(mark for mark, n in counts.items() if n == count), strict=True)
        colours = [scale.to_rgba(level) if scale and isinstance(level, int) else colour for level in levels]
        ax.scatter(budgets, lengths, max(5.0, area * count), colours, alpha=0.55, linewidths=0, rasterized=len(counts) > MOST_MARKS)


def draw_tokens_by_level(evals: dict[str, Eval]) -> Figure | None:
    """Draw mean tokens by level and stage, and the mean budget of the last stage."""
    last = list(evals.values())[-1]
    levels = list(last["by_level"])
    if len(levels) < 2:
        return None
    figure = Figure((6.4, 3.6))
    ax = figure.subplots()

    def plot(e: Eval, measure: str, **style: Any) -> None:
        values = np.array([e["by_level"].get(level, {}).get(measure) for level in levels], float)
        if not np.isnan(values).all():
            ax.plot(range(len(levels)), values, **style)

    for stage, e in evals.items():
        plot(e, "mean_tokens", marker="o", color=COLOURS[stage], markersize=4.5, label=STAGES[stage])
    plot(last, "mean_budget", marker="D", linestyle="none", color=INK, markerfacecolor="none", label="budget")
    ax.set_xticks(range(len(levels)), levels)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="level of the question", ylabel="mean tokens an answer")
    add_legend(ax)
    return figure


def draw_training(metrics: Sequence[Row]) -> Figure | None:
    """Draw the logged metrics by step, in one panel each, three in a row."""
    logged = {key: {row["step"]: row[key] for row in metrics if row.get(key) is not None} for keys in TRAINING.values() for key in keys}
    shown = {title: keys for title, keys in TRAINING.items() if all(len(logged[key]) > 1 for key in keys)}
    if not shown:
        return None
    rows, columns = -(-len(shown) // 3), min(3, len(shown))
    figure = Figure((3.1 * columns, 2.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax in axes[len(shown) :]:
        ax.remove()
    for (title, keys), ax in zip(shown.items(), axes, strict=False):
        ax.set(title=title, xlabel="step")
        for key in keys:
            plot_metric(key, logged[key], ax)
        if len(keys) > 1:
            ax.legend()
    return figure


def plot_metric(key: str, by_step: dict[int, float], ax: Axes) -> None:
    """Plot the value of each step, faint, and the running mean."""
    steps, values = zip(*sorted(by_step.items()), strict=True)
    smooth = values if key == "alpha" else running_mean(values, max(1, len(values) // 12))
    colour = INK if key == "budget" else COLOURS["grpo"]
    ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    ax.plot(steps, smooth, color=colour, linewidth=1.8, label={"tokens": "used"}.get(key, key))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if key == "alpha":
        ax.set_yscale("log")
        set_log_ticks(ax.yaxis, (1, 3))
    elif key != "reward":
        ax.set_ylim(0, 1 if key in ("accuracy", "within_50") else None)
    if key in ("accuracy", "within_50", "malformed"):
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Compute each value's mean with up to `reach` neighbours on both sides."""
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]
