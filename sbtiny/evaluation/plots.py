"""The figures of a report. A figure is a list of panels: side by side in a PNG, one SVG each in the page, where they wrap.

Colour-blind readers can tell the colours apart, as with Okabe and Ito's. In an SVG they become CSS variables, so that the page can be
dark.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from sbtiny.evaluation.report import STAGES, Eval, ReportData, Row, tokens

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
COLOURS = {"base": "#7d8590", "sft": "#2f81c1", "grpo": "#d1480f"}
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", **{colour: stage for stage, colour in COLOURS.items()}}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a dollar in the name of a level is no formula
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "sbtiny",  # the same run draws the same bytes
}
# Blue to amber, of medium lightness: the ends of the usual maps vanish on a dark or a light page.
LEVELS = LinearSegmentedColormap.from_list("levels", ["#5266d9", "#1f9e96", "#cf9d0c"])
MARKS = "vo^Ds"  # one for each budget of a sweep
MOST_MARKS = 3000  # above this a scatter becomes an image inside the SVG
TICKS = [m * 10**k for k in range(7) for m in (1, 2, 5)]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: title, size in inches, and the function that draws it."""

    title: str
    size: tuple[float, float]
    draw: Callable[[Axes], None]


def draw_figures(evidence: ReportData) -> dict[str, list[Panel]]:
    """Build the panels of each figure by name; none where the run lacks the data."""
    evals = {stage: e for stage, e in evidence.evals.items() if e}
    levels = list(next(reversed(evals.values()))["by_level"])
    wide = (6.4, 3.6)
    trade = Panel("accuracy and mean tokens", wide, partial(plot_accuracy_tokens, evals, evidence.sweep))
    by_level = Panel("mean tokens by level", wide, partial(draw_levels, evals, levels))
    return {
        "accuracy_tokens": [trade] if len(evals) > 1 or evidence.sweep else [],
        "predicted_used": budget_panels(evidence.samples),
        "tokens_by_level": [by_level] if len(levels) > 1 else [],
        "training": training_panels(evidence.metrics),
    }


def to_png(panels: Sequence[Panel]) -> bytes:
    """Draw all panels in one image on white, at most three in a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = panels[0].size
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        for panel, ax in zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
            panel.draw(ax)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=180)
    return buffer.getvalue()


def to_svg(panel: Panel, name: str) -> str:
    """Draw a transparent <svg> element for a page. Its colours are CSS variables, its ids start with `name`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=panel.size, layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        panel.draw(ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r' (?:xmlns(?::xlink)?|width|height)="[^"]*"', "", text[text.index("<svg") :], count=4)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{panel.title}"', 1).strip()


def plot_accuracy_tokens(evals: dict[str, Eval], sweep: Sequence[Eval], ax: Axes) -> None:
    """Plot accuracy against mean tokens of each stage and each given budget. A legend names the points, as they may coincide."""
    points = [*evals.values(), *sweep]
    most = max(e["mean_tokens"] for e in points)
    edges = [edge for e in points for edge in e["accuracy_ci95"]]
    middle, half = (max(edges) + min(edges)) / 2, max(0.04, 0.68 * (max(edges) - min(edges)))
    for stage, e in evals.items():
        x, colour = e["mean_tokens"], COLOURS[stage]
        ax.plot([x, x], e["accuracy_ci95"], color=colour, linewidth=1.6, solid_capstyle="round")
        ax.plot(x, e["accuracy"], "o", color=colour, markersize=7, label=f"{STAGES[stage]}: {tokens(x)} tokens")
    if sweep:
        draw_sweep(sweep, ax)
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    ax.set(xlim=(0, 1.1 * most), ylim=(middle - half, middle + half))
    ax.set(xlabel="mean tokens an answer", ylabel="accuracy")
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %" if y < 1.001 else ""))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def draw_sweep(sweep: Sequence[Eval], ax: Axes) -> None:
    """Draw the run with other given budgets: hollow marks, joined in the order of their tokens."""
    ordered = sorted(sweep, key=lambda e: e["mean_tokens"])
    colour = COLOURS["grpo"]
    ax.plot([e["mean_tokens"] for e in ordered], [e["accuracy"] for e in ordered], color=colour, alpha=0.55, linewidth=1.2)
    hollow = {"linestyle": "none", "color": colour, "markerfacecolor": "none", "markersize": 9.5}
    for e, mark in zip(sweep, cycle(MARKS)):
        ax.plot(e["mean_tokens"], e["accuracy"], mark, label=f"given {e.get('budget', '')}: {tokens(e['mean_tokens'])}", **hollow)


def budget_panels(samples: dict[str, list[Row]]) -> list[Panel]:
    """Build the panels of budget against length, for the cold start and after GRPO, on the same axes."""
    budgeted = {stage: [row for row in samples[stage] if row["budget"]] for stage in ("sft", "grpo")}
    sizes = [size for rows in budgeted.values() for row in rows for size in (row["budget"], max(1, row["length"]))]
    levels = sorted({row["level"] for rows in budgeted.values() for row in rows if isinstance(row.get("level"), int)})
    return [
        Panel(
            f"budget and tokens used, {STAGES[stage]}",
            (4.2, 4.4),
            partial(plot_budget_length, stage, rows, levels, (min(sizes), max(sizes))),
        )
        for stage, rows in budgeted.items()
        if rows
    ]


def plot_budget_length(stage: str, rows: Sequence[Row], levels: Sequence[int], extent: tuple[int, int], ax: Axes) -> None:
    """Plot length against budget on logarithmic axes, where a band is a strip. The area of a mark is its number of answers."""
    low, high = extent[0] / 1.3, extent[1] * 1.3
    for tolerance, shade in ((0.5, 0.07), (0.1, 0.12)):
        band = [[(1 + side * tolerance) * x for x in (low, high)] for side in (-1, 1)]
        ax.fill_between((low, high), *band, color=INK, alpha=shade, linewidth=0)
    ax.plot((low, high), (low, high), color=MUTED, linewidth=0.8)
    ax.text(0.98, 0.02, "bands: ± 10 %, ± 50 %", color=MUTED, size=8, ha="right", transform=ax.transAxes)
    counts = Counter((row["budget"], max(1, row["length"]), row.get("level")) for row in rows)
    for count in sorted(set(counts.values()), reverse=True):  # marks of one size share their outline in an SVG
        budgets, lengths, mark_levels = zip(*(mark for mark, n in counts.items() if n == count), strict=True)
        colours = [level_colour(level, levels, stage) for level in mark_levels]
        ax.scatter(budgets, lengths, 9 * count, colours, alpha=0.55, linewidths=0, rasterized=len(counts) > MOST_MARKS)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel="budget, tokens", ylabel="tokens used")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set(major_locator=FixedLocator(TICKS), minor_locator=NullLocator(), major_formatter=FuncFormatter(short_name))
    ax.set_title(STAGES[stage], color=COLOURS[stage], weight="bold", pad=7)
    level_legend(levels, ax)


def short_name(x: float, _: int) -> str:
    """Format a round number of tokens: 200, 5k."""
    return f"{x / 1000:.0f}k" if x >= 1000 else f"{x:.0f}"


def level_colour(level: int | str | None, levels: Sequence[int], stage: str) -> str | tuple[float, ...]:
    if len(levels) < 2 or level not in levels:
        return COLOURS[stage]
    return LEVELS(levels.index(level) / (len(levels) - 1))


def level_legend(levels: Sequence[int], ax: Axes) -> None:
    """Write the levels in their colours, right of the title; of more than 8 levels, a selection."""
    if len(levels) < 2:
        return
    named = levels if len(levels) <= 8 else levels[:: -(-len(levels) // 8)]
    for i, level in enumerate(reversed(named)):
        colour = level_colour(level, levels, "grpo")
        ax.text(1 - 0.06 * i, 1.03, str(level), color=colour, weight="bold", ha="right", transform=ax.transAxes)
    ax.text(0.985 - 0.06 * len(named), 1.03, "level", color=MUTED, ha="right", transform=ax.transAxes)


def draw_levels(evals: dict[str, Eval], levels: Sequence[str], ax: Axes) -> None:
    """Plot mean tokens by level and stage, and the mean budget of the last stage."""

    def draw(e: Eval, measure: str, **style: Any) -> None:
        known = [(i, e["by_level"].get(level, {}).get(measure)) for i, level in enumerate(levels)]
        if known := [(i, value) for i, value in known if value is not None]:
            ax.plot(*zip(*known, strict=True), **style)

    for stage, e in evals.items():
        draw(e, "mean_tokens", marker="o", color=COLOURS[stage], markersize=4.5, label=STAGES[stage])
    hollow = {"linestyle": "none", "markerfacecolor": "none", "markeredgecolor": INK, "markersize": 6}
    draw(list(evals.values())[-1], "mean_budget", marker="D", label="budget", **hollow)
    top = 1.08 * max(max(line.get_ydata()) for line in ax.lines)
    ax.set(ylim=(0, top or 1), xlim=(-0.3, len(levels) - 0.7), xlabel="level of the question", ylabel="mean tokens an answer")
    ax.set_xticks(range(len(levels)), levels)
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def training_panels(metrics: Sequence[Row]) -> list[Panel]:
    """Build one small panel for each logged metric, by step."""
    metrics_by_title = {
        "reward": {"reward": ("", COLOURS["grpo"])},
        "accuracy": {"accuracy": ("", COLOURS["grpo"])},
        "tokens": {"budget": ("budget", INK), "tokens": ("used", COLOURS["grpo"])},
        "within 50 % of the budget": {"within_50": ("", COLOURS["grpo"])},
        "malformed": {"malformed": ("", COLOURS["grpo"])},
        "alpha, the width of the window": {"alpha": ("", COLOURS["grpo"])},
    }
    panels = []
    for title, keys in metrics_by_title.items():
        series = {key: {row["step"]: row[key] for row in metrics if row.get(key) is not None} for key in keys}
        if all(len(values) > 1 for values in series.values()):
            panels.append(Panel(title, (3.1, 2.4), partial(draw_training, title, keys, series)))
    return panels


def draw_training(title: str, keys: dict[str, tuple[str, str]], series: dict[str, dict[int, float]], ax: Axes) -> None:
    """Plot the value of each step, faint, and the running mean."""
    for i, (key, (label, colour)) in enumerate(keys.items()):
        steps, values = zip(*sorted(series[key].items()), strict=True)
        smooth = values if key == "alpha" else running_mean(values, max(1, len(values) // 12))
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(steps, smooth, color=colour, linewidth=1.8)
        ax.text(0.98, 0.96 - 0.13 * i, label, color=colour, weight="bold", ha="right", va="top", transform=ax.transAxes)
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if keys.keys() & {"accuracy", "within_50", "malformed"}:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        ax.set_ylim(0, min(1.0, max(0.05, 1.1 * max(values))) if "malformed" in keys else 1)
    elif "tokens" in keys:
        ax.set_ylim(bottom=0)
    elif "alpha" in keys:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=FixedLocator([0.1, 0.3, 1, 3, 10]), minor_locator=NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Compute each value's mean with up to `reach` neighbours on both sides."""
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]
