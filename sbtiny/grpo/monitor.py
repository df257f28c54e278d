"""The monitor of GRPO: reports alarms and stops a run that collapses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl

from sbtiny.errors import Failed
from sbtiny.grpo.alarms import Alarm, Alarms
from sbtiny.progress import console
from sbtiny.training.checkpoint import last_checkpoint
from sbtiny.training.monitor import TrainingMonitor


class GrpoMonitor(TrainingMonitor):
    """Feeds each step's metrics to the alarms and saves no checkpoint of a collapsing run."""

    def __init__(self, steps: int, output: Path, alarms: Alarms) -> None:
        super().__init__("grpo", steps, output)
        self.alarms, self.ringing = alarms, []

    def extra_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        self.ringing = self.alarms.feed(metrics) if "reward" in metrics else []
        return {"alarms": [alarm.name for alarm in self.ringing]} if self.ringing else {}

    def after_log(self, step: int, control: TrainerControl) -> None:
        if self.alarms.collapsing:  # a bad checkpoint would push a good one out
            control.should_save = False
        self._raise_alarms(self.ringing, step)

    def _raise_alarms(self, ringing: Sequence[Alarm], step: int) -> None:
        """Print each alarm with its cause; raises Failed for a collapse, with the last good checkpoint.

        The metrics of a step are of the weights after the step before it. So checkpoints are good up to two steps before the first bad one.
        """
        for alarm in ringing:
            message = f"{alarm.name}, {self.alarms.patience} steps in a row up to step {step}: {alarm.cause}"
            if alarm.collapse:
                good = last_checkpoint(self.output, upto=step - self.alarms.patience - 1)
                raise Failed(f"stopped, {message} (last good checkpoint: {good or 'none, set grpo.save_steps'})")
            console.print(f"warning: {message}", markup=False, style="yellow")
