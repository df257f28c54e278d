"""What goes wrong in a GRPO run without anyone looking, told from the figures of its steps. Pure.

An alarm rings when its condition held for some steps running, once a run; three of them say that the run has collapsed and stop it.
"""

from dataclasses import dataclass, field
from statistics import median

PATIENCE = 20  # steps running that a condition must hold
SOMETHING = 0.2  # an accuracy that is worth the name: below it there is nothing to lose
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Rings when `figure` is above `limit`, or, when `relative`, above `limit` times its own early level, or, when it `falls`, below that.

    A `collapse` stops the run; it is a change, so that a run which began there, without a cold start say, is not one.
    """

    name: str
    figure: str
    limit: float
    cause: str
    relative: bool = False
    falls: bool = False
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
        "collapse of accuracy",
        "accuracy",
        0.5,
        "less than half of its early accuracy is left; lower grpo.lr or grpo.clip",
        falls=True,
        collapse=True,
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
    """The state of all alarms; `asdict` of it is what a checkpoint keeps. `patience`: steps running that a condition must hold."""

    running: dict[str, int] = field(default_factory=dict)  # steps that a condition has held without a break
    early: dict[str, list[float]] = field(default_factory=dict)  # the first figures of those that are compared with themselves
    rung: list[str] = field(default_factory=list)
    patience: int = PATIENCE

    @property
    def collapsing(self) -> bool:
        """A collapse may have begun: its condition holds at this step."""
        return any(self.running.get(alarm.name) for alarm in ALARMS if alarm.collapse)

    def feed(self, figures: Figures) -> list[Alarm]:
        """The alarms that ring with this step. A figure that is missing or NaN says nothing: nothing was there to measure."""
        return [alarm for alarm in ALARMS if self._count(alarm, figures) >= self.patience and self._first(alarm)]

    def _count(self, alarm: Alarm, figures: Figures) -> int:
        value = figures.get(alarm.figure)
        if value is None or value != value:
            return 0
        self.running[alarm.name] = self.running.get(alarm.name, 0) + 1 if self._bad(alarm, value) else 0
        return self.running[alarm.name]

    def _bad(self, alarm: Alarm, value: float) -> bool:
        level = self._level(alarm.figure, value)
        if level is None:
            return False
        if alarm.falls:
            return level >= SOMETHING and value < alarm.limit * level
        if alarm.relative:
            return value > alarm.limit * level
        return value > alarm.limit and not (alarm.collapse and level > alarm.limit)

    def _level(self, figure: str, value: float) -> float | None:
        """The median of the first figures, half as many as the patience has steps; None while they are still being gathered.

        Not their mean: one number of thousands among them would make all that follows look small.
        """
        first = self.early.setdefault(figure, [])
        if 2 * len(first) < self.patience:
            first.append(value)
            return None
        return median(first)

    def _first(self, alarm: Alarm) -> bool:
        if alarm.name in self.rung:
            return False
        self.rung.append(alarm.name)
        return True
