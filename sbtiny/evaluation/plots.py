"""The figures of a report. A figure is a list of panels: side by side in a PNG, one SVG each in the page, where they wrap.

Colours are Okabe and Ito's kind, told apart by colour-blind readers. In an SVG they become CSS variables, so that the page can be
dark.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from sbtiny.evaluation.report import STAGES, Eval, Evidence, Row, tokens

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
COLOURS = {"base": "#7d8590", "sft": "#2f81c1", "grpo": "#d1480f"}
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", **{colour: stage for stage, colour in COLOURS.items()}}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a dollar in the name of a level is one
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
# Blue to amber, of middling lightness: the ends of the usual maps vanish on a dark or on a light page.
LEVELS = LinearSegmentedColormap.from_list("levels", ["#5266d9", "#1f9e96", "#cf9d0c"])
MOST_MARKS = 3000  # above it a scatter becomes an image inside the SVG
TICKS = [m * 10**k for k in range(7) for m in (1, 2, 5)]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: what it shows in words, its size in inches, and how to draw it."""

    title: str
    size: tuple[float, float]
    draw: Callable[[Axes], None]


def figures(evidence: Evidence) -> dict[str, list[Panel]]:
    """The panels of each figure by name; none where the run lacks what it shows."""
    evals = {stage: e for stage, e in evidence.evals.items() if e}
    levels = list(next(reversed(evals.values()))["by_level"])
    wide = (5.2, 3.6)
    trade = Panel("accuracy and mean tokens", wide, partial(draw_trade, evals, evidence.sweep))
    by_level = Panel("mean tokens by level", wide, partial(draw_levels, evals, levels))
    return {
        "accuracy_tokens": [trade] if len(evals) > 1 or evidence.sweep else [],
        "predicted_used": promise_panels(evidence.samples),
        "tokens_by_level": [by_level] if len(levels) > 1 else [],
        "training": training_panels(evidence.metrics),
    }


def png(panels: Sequence[Panel]) -> bytes:
    """All panels in one image on white, at most three in a row."""
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


def svg(panel: Panel, name: str) -> str:
    """An <svg> element to put into a page: transparent, its colours CSS variables, its ids starting with `name`."""
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


def draw_trade(evals: dict[str, Eval], sweep: Sequence[Eval], ax: Axes) -> None:
    """Accuracy against mean tokens: before, after, and how far the budget given moves it."""
    shown = [*evals.values(), *sweep]
    most = max(e["mean_tokens"] for e in shown)
    edges = [edge for e in shown for edge in e["accuracy_ci95"]]
    middle, half = (max(edges) + min(edges)) / 2, max(0.04, 0.68 * (max(edges) - min(edges)))
    last = list(evals.values())[-1]["mean_tokens"]
    crowd = [e["mean_tokens"] for e in evals.values() if abs(e["mean_tokens"] - last) < most / 3]
    if sweep:
        draw_sweep(sweep, (0.06 * most, 0.1 * half), last if len(crowd) == 1 else 0, ax)
    for stage, e in evals.items():
        ax.plot([e["mean_tokens"]] * 2, e["accuracy_ci95"], color=COLOURS[stage], linewidth=1.6, solid_capstyle="round")
        ax.plot(e["mean_tokens"], e["accuracy"], "o", color=COLOURS[stage], markersize=8)
        aside = stage == "grpo" and len(crowd) > 1 and min(crowd) > 0.4 * most  # further left there is no room
        label_stage(stage, e, min(crowd) if aside else None, ax)
    if "base" in evals and "grpo" in evals:
        ends = [(evals[stage]["mean_tokens"], evals[stage]["accuracy"]) for stage in ("grpo", "base")]
        style = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 0.9, "shrinkA": 9, "shrinkB": 9}
        ax.annotate("", *ends, arrowprops=style)
    ax.set(xlim=(0, 1.2 * most), ylim=(middle - half, middle + half))
    ax.set(xlabel="mean tokens an answer", ylabel="accuracy")
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %" if y < 1.001 else ""))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def label_stage(stage: str, e: Eval, left_of: float | None, ax: Axes) -> None:
    """The stage's name above its interval; the cold start's, which often lies on the base, below; or left of a crowd."""
    x, (lo, hi) = e["mean_tokens"], e["accuracy_ci95"]
    at, offset, across, along = (x, hi), (0, 5), "center", "bottom"
    if stage == "sft":
        at, offset, along = (x, lo), (0, -5), "top"
    elif left_of is not None:
        at, offset, across, along = (left_of, e["accuracy"]), (-8, 0), "right", "center"
    style = {"color": COLOURS[stage], "weight": "bold", "ha": across, "va": along}
    ax.annotate(f"{STAGES[stage]}: {tokens(x)} tokens", at, offset, textcoords="offset points", **style)


def draw_sweep(sweep: Sequence[Eval], near: tuple[float, float], left: float, ax: Axes) -> None:
    """The run told to use other budgets.

    Points closer than `near` (tokens, accuracy) share a label. Labels of points up to `left` tokens stand at the left,
    for the arrow from the base comes from the right.
    """
    ordered = sorted(sweep, key=lambda e: e["mean_tokens"])
    xs, ys = [e["mean_tokens"] for e in ordered], [e["accuracy"] for e in ordered]
    ax.plot(xs, ys, "-o", color=COLOURS["grpo"], alpha=0.55, linewidth=1.2, markersize=4)
    groups = [[0]]
    for i in range(1, len(ordered)):
        last = groups[-1][-1]
        if xs[i] - xs[last] < near[0] and abs(ys[i] - ys[last]) < near[1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        at = (xs[group[-1]], min(ys[i] for i in group))
        text = ", ".join(str(ordered[i].get("budget", "")) for i in group)
        side, offset = ("right", (-5, -3)) if at[0] < left + near[0] else ("left", (4, -3))
        ax.annotate(text, at, offset, textcoords="offset points", ha=side, va="top", color=COLOURS["grpo"], size=8)


def promise_panels(samples: dict[str, list[Row]]) -> list[Panel]:
    """Announced against used, for the cold start and after GRPO, on the same axes."""
    told = {stage: [row for row in samples[stage] if row["budget"]] for stage in ("sft", "grpo")}
    sizes = [size for rows in told.values() for row in rows for size in (row["budget"], max(1, row["length"]))]
    levels = sorted({row["level"] for rows in told.values() for row in rows if isinstance(row.get("level"), int)})
    return [
        Panel(
            f"announced and used, {STAGES[stage]}",
            (4.2, 4.4),
            partial(draw_promise, stage, rows, levels, (min(sizes), max(sizes))),
        )
        for stage, rows in told.items()
        if rows
    ]


def draw_promise(stage: str, rows: Sequence[Row], levels: Sequence[int], extent: tuple[int, int], ax: Axes) -> None:
    """Each mark is one or more answers (its area says how many); both axes are logarithmic, so a band is a strip."""
    low, high = extent[0] / 1.3, extent[1] * 1.3
    for tolerance, shade in ((0.5, 0.07), (0.1, 0.12)):
        band = [[(1 + side * tolerance) * x for x in (low, high)] for side in (-1, 1)]
        ax.fill_between((low, high), *band, color=INK, alpha=shade, linewidth=0)
    ax.plot((low, high), (low, high), color=MUTED, linewidth=0.8)
    ax.text(0.98, 0.02, "bands: ± 10 %, ± 50 %", color=MUTED, size=8, ha="right", transform=ax.transAxes)
    counts = Counter((row["budget"], max(1, row["length"]), row.get("level")) for row in rows)
    for many in sorted(set(counts.values()), reverse=True):  # marks of one size share their outline in an SVG
        budgets, lengths, found = zip(*(mark for mark, n in counts.items() if n == many), strict=True)
        colours = [level_colour(level, levels, stage) for level in found]
        ax.scatter(budgets, lengths, 9 * many, colours, alpha=0.55, linewidths=0, rasterized=len(counts) > MOST_MARKS)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel="tokens announced", ylabel="tokens used")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set(major_locator=FixedLocator(TICKS), minor_locator=NullLocator(), major_formatter=FuncFormatter(short))
    ax.set_title(STAGES[stage], color=COLOURS[stage], weight="bold", pad=7)
    name_levels(levels, ax)


def short(x: float, _: int) -> str:
    """A round number of tokens: 200, 5k."""
    return f"{x / 1000:.0f}k" if x >= 1000 else f"{x:.0f}"


def level_colour(level: int | str | None, levels: Sequence[int], stage: str) -> str | tuple[float, ...]:
    if len(levels) < 2 or level not in levels:
        return COLOURS[stage]
    return LEVELS(levels.index(level) / (len(levels) - 1))


def name_levels(levels: Sequence[int], ax: Axes) -> None:
    """The levels in their colours, at the title's right; of many, the ends and some between."""
    if len(levels) < 2:
        return
    named = levels if len(levels) <= 8 else levels[:: -(-len(levels) // 8)]
    for i, level in enumerate(reversed(named)):
        colour = level_colour(level, levels, "grpo")
        ax.text(1 - 0.06 * i, 1.03, str(level), color=colour, weight="bold", ha="right", transform=ax.transAxes)
    ax.text(0.985 - 0.06 * len(named), 1.03, "level", color=MUTED, ha="right", transform=ax.transAxes)


def draw_levels(evals: dict[str, Eval], levels: Sequence[str], ax: Axes) -> None:
    """Mean tokens by level and stage, and the mean number announced by the last one."""
    ends = {}
    for stage, e in evals.items():
        known = [(i, e["by_level"][level]) for i, level in enumerate(levels) if level in e["by_level"]]
        if known:
            ax.plot(
                [i for i, _ in known], [x["mean_tokens"] for _, x in known], "-o", color=COLOURS[stage], markersize=4.5
            )
            ends[f"{STAGES[stage]} {tokens(known[-1][1]['mean_tokens'])}"] = (
                known[-1][1]["mean_tokens"],
                COLOURS[stage],
            )
    stage = list(evals)[-1]
    said = [(i, evals[stage]["by_level"][level]["mean_budget"]) for i, level in enumerate(levels)]
    said = [(i, budget) for i, budget in said if budget is not None]
    if said:
        hollow = {"markerfacecolor": "none", "markeredgecolor": INK, "markersize": 6, "linestyle": "none"}
        ax.plot(*zip(*said, strict=True), "D", **hollow)
        ends["◇ announced"] = (said[-1][1], INK)
    top = 1.08 * max(max(line.get_ydata()) for line in ax.lines)
    ax.set(
        ylim=(0, top), xlim=(-0.3, len(levels) - 0.7), xlabel="level of the question", ylabel="mean tokens an answer"
    )
    ax.set_xticks(range(len(levels)), levels)
    places = spread([y for y, _ in ends.values()], 0.065 * top)
    for (text, (_, colour)), y in zip(ends.items(), places, strict=True):
        ax.text(len(levels) - 0.6, y, text, color=colour, va="center", weight="bold", clip_on=False)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values in their order, pushed up where they are closer than `gap`."""
    places, last = list(values), -np.inf
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        last = places[i] = max(values[i], last + gap)
    return places


def training_panels(metrics: Sequence[Row]) -> list[Panel]:
    """Small multiples by step; only those that were logged."""
    shown = {
        "reward": {"reward": ("", COLOURS["grpo"])},
        "accuracy": {"accuracy": ("", COLOURS["grpo"])},
        "tokens": {"budget": ("announced", INK), "tokens": ("used", COLOURS["grpo"])},
        "within 50 % of the number": {"within_50": ("", COLOURS["grpo"])},
        "malformed": {"malformed": ("", COLOURS["grpo"])},
        "alpha, the width of the window": {"alpha": ("", COLOURS["grpo"])},
    }
    panels = []
    for title, keys in shown.items():
        series = {key: {row["step"]: row[key] for row in metrics if row.get(key) is not None} for key in keys}
        if all(len(values) > 1 for values in series.values()):
            panels.append(Panel(title, (3.1, 2.4), partial(draw_training, title, keys, series)))
    return panels


def draw_training(title: str, keys: dict[str, tuple[str, str]], series: dict[str, dict[int, float]], ax: Axes) -> None:
    """The values of each step, faint, and their running mean."""
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
    """Each value's mean with up to `reach` neighbours on both sides."""
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]
