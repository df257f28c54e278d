"""Alarms of a GRPO run, from the metrics of its steps, and the monitor that feeds them.

An alarm rings once a run, when its condition has held for `patience` steps in a row. Three alarms mean a collapse and stop the run.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerControl

from sbtiny.errors import Failed
from sbtiny.progress import console
from sbtiny.training.checkpoint import last_checkpoint
from sbtiny.training.live_table import StepMetrics
from sbtiny.training.monitor import TrainingMonitor

ALARM_STEPS = 20  # steps in a row that a condition must hold
MIN_ACCURACY = 0.2  # an early accuracy below it cannot collapse


@dataclass(frozen=True, slots=True)
class Alarm:
    """Rings when `metric` is above `limit`. `relative`: above `limit` times its early level. `falls`: below that.

    A `collapse` stops the run. A run that was already that bad at the start does not count as collapsed.
    """

    name: str
    metric: str
    limit: float
    cause: str
    relative: bool = False
    falls: bool = False
    collapse: bool = False


ALARMS = (
    Alarm(
        "budget inflation",
        "budget_if_failed",
        2.0,
        "the budget of questions that the initial model failed is over twice its early level: nothing bounds it there; "
        "set grpo.b_max_if_failed to what such an answer may take",
        relative=True,
    ),
    Alarm(
        "wrong answers grow",
        "length_if_wrong",
        1.5,
        "wrong answers are over 1.5 times their early length: length without success; lower grpo.learning_rate or give easier questions",
        relative=True,
    ),
    Alarm(
        "text outside the tags",
        "text_outside_tags",
        0.1,
        "over a tenth of the answers write around the tags, where no budget counts; lower grpo.learning_rate or lengthen the cold start",
    ),
    Alarm(
        "collapse of accuracy",
        "accuracy",
        0.5,
        "less than half of its early accuracy is left; lower grpo.learning_rate or grpo.max_grad_norm",
        falls=True,
        collapse=True,
    ),
    Alarm(
        "collapse of format",
        "malformed",
        0.5,
        "over half of the answers are malformed; lower grpo.learning_rate, or raise grpo.max_tokens if they are cut",
        collapse=True,
    ),
    Alarm(
        "collapse of spread",
        "frac_reward_zero_std_sampled",
        0.9,
        "over 90 % of the groups have answers of equal reward: raise grpo.temperature or grpo.num_generations, or give other questions",
        collapse=True,
    ),
)


@dataclass(slots=True)
class Alarms:
    """The state of all alarms; a checkpoint holds its `asdict`. `patience`: steps in a row that a condition must hold."""

    running: dict[str, int] = field(default_factory=dict)  # by alarm: steps in a row that its condition has held
    early: dict[str, list[float]] = field(default_factory=dict)  # by metric: its first values
    rung: list[str] = field(default_factory=list)
    patience: int = ALARM_STEPS

    @property
    def collapsing(self) -> bool:
        """Whether the condition of a collapse holds at this step."""
        return any(self.running.get(alarm.name) for alarm in ALARMS if alarm.collapse)

    def feed(self, metrics: StepMetrics) -> list[Alarm]:
        """The alarms that ring with this step. A missing or NaN metric rings none and breaks no row of steps."""
        ringing = []
        for alarm in ALARMS:
            value = metrics.get(alarm.metric, math.nan)
            if math.isnan(value):
                continue
            self.running[alarm.name] = self.running.get(alarm.name, 0) + 1 if self._holds(alarm, value) else 0
            if self.running[alarm.name] >= self.patience and alarm.name not in self.rung:
                ringing.append(alarm)
        self.rung += [alarm.name for alarm in ringing]
        return ringing

    def _holds(self, alarm: Alarm, value: float) -> bool:
        """Whether the condition holds; never while the early level, the median of the first `patience` / 2 values, is unknown.

        A mean would let a single wild value make all later ones look small.
        """
        first = self.early.setdefault(alarm.metric, [])
        if 2 * len(first) < self.patience:
            first.append(value)
            return False
        level = median(first)
        if alarm.falls:
            return level >= MIN_ACCURACY and value < alarm.limit * level
        if alarm.relative:
            return value > alarm.limit * level
        return value > alarm.limit and not (alarm.collapse and level > alarm.limit)


class GrpoMonitor(TrainingMonitor):
    """Feeds each step's metrics to the alarms, saves no checkpoint of a collapsing run and stops it."""

    def __init__(self, steps: int, output: Path, alarms: Alarms) -> None:
        super().__init__("grpo", steps, output)
        self.alarms, self.ringing = alarms, []

    def extra_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        self.ringing = self.alarms.feed(metrics) if "reward" in metrics else []
        return {"alarms": [alarm.name for alarm in self.ringing]} if self.ringing else {}

    def after_log(self, step: int, control: TrainerControl) -> None:
        """Print each alarm with its cause; raises Failed for a collapse, with the last good checkpoint.

        The metrics of a step are of the weights after the step before it. So checkpoints are good up to two steps before the first bad one.
        """
        if self.alarms.collapsing:  # a bad checkpoint would push a good one out
            control.should_save = False
        for alarm in self.ringing:
            message = f"{alarm.name}, {self.alarms.patience} steps in a row up to step {step}: {alarm.cause}"
            if alarm.collapse:
                good = last_checkpoint(self.output, upto=step - self.alarms.patience - 1)
                raise Failed(f"stopped, {message} (last good checkpoint: {good or 'none, set grpo.save_steps'})")
            console.print(f"warning: {message}", markup=False, style="yellow")
