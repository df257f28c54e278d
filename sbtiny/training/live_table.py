"""The live table of a training run: one row for each of its last steps, or single lines in a log file."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.table import Table

StepMetrics = Mapping[str, float]
SPLIT = "sample+train s"
ROWS, LINES = 8, 20  # rows of the table; lines for a whole run without a terminal
COLUMNS = {
    "loss": ("loss", "{:.3f}"),
    "mean_token_accuracy": ("tokens right", "{:.1%}"),
    "reward": ("reward", "{:.2f}"),
    "accuracy": ("right", "{:.0%}"),
    "tokens": ("tokens", "{:.0f}"),
    "budget": ("budget", "{:.0f}"),
    "within_50": ("within 50%", "{:.0%}"),
    "frac_reward_zero_std_sampled": ("no spread", "{:.0%}"),
    "malformed": ("malformed", "{:.0%}"),
    "kl": ("KL", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "alpha": ("alpha", "{:.2f}"),
    "peak_gb": ("peak GiB", "{:.2f}"),
}  # key of the log: heading and format, in screen order


def format_metrics(figures: StepMetrics) -> dict[str, str]:
    """Heading -> formatted value of a step's log; one entry holds the seconds of generation and training where both are known."""
    known = {key: figures[key] for key in COLUMNS if figures.get(key) is not None}
    if "reward" in known:
        known.pop("loss", None)  # on-policy it is always near 0
    cells = {COLUMNS[key][0]: COLUMNS[key][1].format(value) for key, value in known.items()}
    generate, step = figures.get("generate_seconds"), figures.get("step_time")
    if generate is not None and step is not None:
        cells[SPLIT] = f"{generate:.1f}+{max(0.0, step - generate):.1f}"
    return cells


def time_left(seconds: float, done: int, to_do: int) -> str:
    """Time left for `to_do` steps when `done` steps took `seconds`, as 0:03:12; "unknown" before the first."""
    return str(timedelta(seconds=round(seconds / done * to_do))) if done else "unknown"


def metrics_table(steps: Sequence[tuple[int, StepMetrics]]) -> Table:
    """A table of the last ROWS of (step, figures); a missing figure is a dash."""
    rows = [(step, format_metrics(figures)) for step, figures in steps[-ROWS:]]
    order = (*(heading for heading, _ in COLUMNS.values()), SPLIT)
    headings = [heading for heading in order if any(heading in row for _, row in rows)]
    table = Table("step", *headings, box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for step, row in rows:
        table.add_row(str(step), *(row.get(heading, "-") for heading in headings))
    return table


def metrics_line(stage: str, step: int, steps: int, figures: StepMetrics, remaining: str) -> str:
    """A step's log as one line, for a log file."""
    parts = [f"{stage} {step}/{steps}", *(f"{heading} {value}" for heading, value in format_metrics(figures).items()), f"left {remaining}"]
    return "  ".join(parts)
