"""What a person sees of a training run, and what is kept of it: progress, metrics.jsonl, a clean stop."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sbtiny.errors import Failed
from sbtiny.progress import bar, console
from sbtiny.runs import append_jsonl
from sbtiny.training.alarms import RUNNING, Alarm, Alarms
from sbtiny.training.checkpoint import last_checkpoint, step_of

FORGOTTEN = ("num_tokens", "train_loss")  # sums that TRL begins anew on resume: they would say less than they seem to


class Watch(TrainerCallback):
    """Shows the named metrics beside a progress bar, writes every log line to metrics.jsonl, and rings the alarms."""

    def __init__(self, stage: str, steps: int, output: Path, shown: Sequence[str], alarms: Alarms | None = None) -> None:
        self.stage, self.steps, self.output, self.shown = stage, steps, output, shown
        self.alarms = alarms or Alarms()
        self.started = time.perf_counter()

    def run(self, trainer: Trainer, resume: Path | None) -> None:
        """Train from the start or from a checkpoint, then save the adapter. A checkpoint of the last step is only taken over."""
        trainer.remove_callback(PrinterCallback)  # TRL prints each log as a dictionary; the bar says it better
        if resume and step_of(resume) >= self.steps:
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(resume), device=str(trainer.model.device)))
        else:
            with bar(self.stage, self.steps) as self.advance:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        self.save_adapter(trainer.model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        row = {"stage": self.stage, "step": state.global_step, "seconds": round(time.perf_counter() - self.started, 2)}
        kept = {key: value for key, value in logs.items() if value is not None and key not in FORGOTTEN}
        ringing = self.alarms.feed(kept) if "reward" in kept else []
        append_jsonl(self.output / "metrics.jsonl", row | kept | ({"alarms": [a.name for a in ringing]} if ringing else {}))
        if (loss := logs.get("loss")) is not None and loss != loss:
            raise Failed(
                f"{self.stage}: the loss is NaN at step {state.global_step}; lower the learning rate (metrics.jsonl has the run so far)"
            )
        self.advance(0, note="  ".join(f"{key} {logs[key]:.3g}" for key in self.shown if logs.get(key) is not None))

        self._tell(ringing, state.global_step)

    def _tell(self, ringing: Sequence[Alarm], step: int) -> None:
        """Warn of each alarm with its cause; raises Failed for a collapse, the checkpoints before it stay."""
        for alarm in ringing:
            told = f"{alarm.name}, {RUNNING} steps running up to step {step}: {alarm.cause}"
            if alarm.collapse:
                good = last_checkpoint(self.output)
                raise Failed(f"stopped, {told} (last checkpoint: {good or 'none, set grpo.save_steps'})")
            console.print(f"warning: {told}", markup=False, style="yellow")

    def save_adapter(self, model: nn.Module) -> None:
        """Save beside and rename: `adapter/` exists only when it is whole."""
        temporary = self.output / ".adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        temporary.replace(self.output / "adapter")
