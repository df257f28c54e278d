"""What a person sees of a training run, and what is kept of it: progress, metrics.jsonl, a clean stop."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sbtiny.errors import Failed
from sbtiny.progress import bar
from sbtiny.runs import append_jsonl


class Watch(TrainerCallback):
    """Shows the named metrics beside a progress bar and writes every log line to metrics.jsonl."""

    def __init__(self, stage: str, steps: int, output: Path, shown: Sequence[str]) -> None:
        self.stage, self.steps, self.output, self.shown = stage, steps, output, shown
        self.started = time.perf_counter()

    def quieten(self, trainer: Trainer) -> None:
        """TRL prints each log as a dictionary; the bar says it better."""
        trainer.remove_callback(PrinterCallback)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = bar(self.stage, self.steps)
        self.advance = self.bar.__enter__()
        self.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        row = {"stage": self.stage, "step": state.global_step, "seconds": round(time.perf_counter() - self.started, 2)}
        append_jsonl(
            self.output / "metrics.jsonl", row | {key: value for key, value in logs.items() if value is not None}
        )
        if (loss := logs.get("loss")) is not None and loss != loss:
            raise Failed(
                f"{self.stage}: the loss is NaN at step {state.global_step}; lower the learning rate (metrics.jsonl has the run so far)"
            )
        self.advance(0, note="  ".join(f"{key} {logs[key]:.3g}" for key in self.shown if logs.get(key) is not None))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.__exit__(None, None, None)

    def save_adapter(self, model: nn.Module) -> None:
        """Save beside and rename: `adapter/` exists only when it is whole."""
        temporary = self.output / ".adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        temporary.replace(self.output / "adapter")
