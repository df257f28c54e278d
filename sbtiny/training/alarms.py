"""What goes wrong in a GRPO run without anyone looking, told from the figures of its steps. Pure.

An alarm rings when its condition held for 20 steps running, once a run; two of them say that the run has collapsed and stop it.
"""

from dataclasses import dataclass, field
from statistics import fmean

RUNNING = 20  # steps running that a condition must hold
EARLY = 10  # steps with a figure, the first ones, whose mean is that figure's early level
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Rings when `figure` is above `limit`, or, when `relative`, above `limit` times its own early level.

    A `collapse` stops the run; it is a fall, so that a run which began there, without a cold start say, is not one.
    """

    name: str
    figure: str
    limit: float
    cause: str
    relative: bool = False
    collapse: bool = False


ALARMS = (
    Alarm(
        "budget inflation",
        "free_budget",
        2.0,
        "the budget of questions that the initial model failed is over twice its early level: nothing bounds it there; "
        "set grpo.failed_bmax to what such an answer may take",
        relative=True,
    ),
    Alarm(
        "wrong answers grow",
        "wrong_length",
        1.5,
        "wrong answers are over 1.5 times their early length: length without success; lower grpo.lr or give easier questions",
        relative=True,
    ),
    Alarm(
        "text outside the tags",
        "outside",
        0.1,
        "over a tenth of the answers write around the tags, where no budget counts; lower grpo.lr or lengthen the cold start",
    ),
    Alarm(
        "collapse of format",
        "malformed",
        0.5,
        "over half of the answers are malformed; lower grpo.lr, or raise grpo.max_tokens if they are cut",
        collapse=True,
    ),
    Alarm(
        "collapse of spread",
        "zero_spread",
        0.9,
        "over 90 % of the groups have answers of equal reward: raise grpo.temperature or grpo.group, or give other questions",
        collapse=True,
    ),
)


@dataclass(slots=True)
class Alarms:
    """The state of all alarms; `asdict` of it is what a checkpoint keeps."""

    running: dict[str, int] = field(default_factory=dict)  # steps that a condition has held without a break
    early: dict[str, list[float]] = field(default_factory=dict)  # the first figures of those that are compared with themselves
    rung: list[str] = field(default_factory=list)

    def feed(self, figures: Figures) -> list[Alarm]:
        """The alarms that ring with this step. A figure that is missing or NaN says nothing: nothing was there to measure."""
        return [alarm for alarm in ALARMS if self._count(alarm, figures) >= RUNNING and self._first(alarm)]

    def _count(self, alarm: Alarm, figures: Figures) -> int:
        value = figures.get(alarm.figure)
        if value is None or value != value:
            return 0
        level = self._level(alarm.figure, value)
        bad = level is not None and value > alarm.limit * (level if alarm.relative else 1.0)
        if alarm.collapse:
            bad = bad and level <= alarm.limit
        self.running[alarm.name] = self.running.get(alarm.name, 0) + 1 if bad else 0
        return self.running[alarm.name]

    def _level(self, figure: str, value: float) -> float | None:
        """The early mean, None while it is still being gathered."""
        first = self.early.setdefault(figure, [])
        if len(first) < EARLY:
            first.append(value)
            return None
        return fmean(first)

    def _first(self, alarm: Alarm) -> bool:
        if alarm.name in self.rung:
            return False
        self.rung.append(alarm.name)
        return True
