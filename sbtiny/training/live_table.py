"""The live table of a training run: its last steps, a row each; in a log file, a line now and then. Pure but for drawing."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.table import Table

Figures = Mapping[str, float]
SPLIT = "sample+train s"
ROWS, LINES = 8, 20  # rows of the table; lines of a whole run where there is no terminal
FORMS = {
    "loss": ("loss", "{:.3f}"),
    "mean_token_accuracy": ("tokens right", "{:.1%}"),
    "reward": ("reward", "{:.2f}"),
    "accuracy": ("right", "{:.0%}"),
    "tokens": ("tokens", "{:.0f}"),
    "budget": ("budget", "{:.0f}"),
    "within_50": ("within 50%", "{:.0%}"),
    "zero_spread": ("no spread", "{:.0%}"),
    "malformed": ("malformed", "{:.0%}"),
    "kl": ("KL", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "alpha": ("alpha", "{:.2f}"),
    "peak_gb": ("peak GiB", "{:.2f}"),
}  # key of the log: heading and format, in their order on the screen


def told(figures: Figures) -> dict[str, str]:
    """Heading -> value of what a step's log holds; generation and training apart, in seconds, where both are known."""
    shown = {key: figures[key] for key in FORMS if figures.get(key) is not None}
    if "reward" in shown:
        shown.pop("loss", None)  # on-policy it is near 0 whatever happens
    found = {FORMS[key][0]: FORMS[key][1].format(value) for key, value in shown.items()}
    generate, step = figures.get("generate_seconds"), figures.get("step_time")
    if generate is not None and step is not None:
        found[SPLIT] = f"{generate:.1f}+{max(0.0, step - generate):.1f}"
    return found


def left(seconds: float, done: int, to_do: int) -> str:
    """Time left when `done` steps took so many seconds, as 0:03:12; unknown before the first."""
    return str(timedelta(seconds=round(seconds / done * to_do))) if done else "unknown"


def table(steps: Sequence[tuple[int, Figures]]) -> Table:
    """The last ROWS of the (step, figures); a figure that a step lacks is a dash."""
    rows = [(step, told(figures)) for step, figures in steps[-ROWS:]]
    order = (*(heading for heading, _ in FORMS.values()), SPLIT)
    headings = [heading for heading in order if any(heading in row for _, row in rows)]
    drawn = Table("step", *headings, box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for step, row in rows:
        drawn.add_row(str(step), *(row.get(heading, "-") for heading in headings))
    return drawn


def line(stage: str, step: int, steps: int, figures: Figures, remaining: str) -> str:
    parts = [f"{stage} {step}/{steps}", *(f"{heading} {value}" for heading, value in told(figures).items()), f"left {remaining}"]
    return "  ".join(parts)
