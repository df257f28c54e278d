"""What a person sees of a training run, and what is kept of it: progress, metrics.jsonl, a clean stop."""

import math
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
from sbtiny.rollout.memory import peak_bytes
from sbtiny.runs import append_jsonl
from sbtiny.training import live_table
from sbtiny import distributed
from sbtiny.grpo.alarms import Alarm, Alarms
from sbtiny.training.checkpoint import last_checkpoint, step_of

SKIPPED = 20  # that is a scale lowered 2**20 times: no scale will do
FORGOTTEN = ("num_tokens", "train_loss")  # sums that TRL begins anew on resume: they would say less than they seem to


class Watch(TrainerCallback):
    """Shows the last steps below a progress bar, writes every log line to metrics.jsonl, and rings the alarms."""

    def __init__(self, stage: str, steps: int, output: Path, alarms: Alarms | None = None) -> None:
        self.stage, self.steps, self.output = stage, steps, output
        self.alarms = alarms or Alarms()
        self.started, self.first = time.perf_counter(), 0
        self.skipped = 0  # logged updates running whose gradient was no number
        self.finite = 0  # the last one before them
        self.seen: list[tuple[int, live_table.Figures]] = []

    def run(self, trainer: Trainer, resume: Path | None) -> None:
        """Train from the start or from a checkpoint, then save the adapter. A checkpoint of the last step is only taken over."""
        trainer.remove_callback(PrinterCallback)  # TRL prints each log as a dictionary; the bar says it better
        if resume:  # transformers passes over it where TRL, with grpo.beta, keeps a second adapter beside it
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(resume), device=str(trainer.model.device)))
        if not resume or step_of(resume) < self.steps:
            with bar(self.stage, self.steps) as self.advance:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if distributed.first():
            self.save_adapter(trainer.model)
            console.print(f"{self.stage}: peak memory {peak_bytes(trainer.args.device) / 2**30:.2f} GiB", markup=False)
        distributed.wait()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first = state.global_step
        self.advance(self.first)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        row = {"stage": self.stage, "step": state.global_step, "seconds": round(time.perf_counter() - self.started, 2)}
        kept = {key: value for key, value in logs.items() if value is not None and key not in FORGOTTEN}
        kept["peak_gb"] = round(peak_bytes(args.device) / 2**30, 2)
        ringing = self.alarms.feed(kept) if "reward" in kept else []
        if distributed.first():
            append_jsonl(self.output / "metrics.jsonl", row | kept | ({"alarms": [a.name for a in ringing]} if ringing else {}))
        self._check_finite(kept, args.fp16, state.global_step)
        if "loss" in kept or "reward" in kept:
            self._show(state.global_step, kept, row["seconds"])
        if self.alarms.collapsing:  # the checkpoints before it are worth more than one of a ruin
            control.should_save = False
        self._tell(ringing, state.global_step)

    def _check_finite(self, figures: live_table.Figures, scaled: bool, step: int) -> None:
        """Raises Failed for a loss or gradient that is no number: weights after it are worth nothing.

        `scaled`: float16's scaler skips an update whose gradient overflows and lowers its scale; that is well, but not for ever. A
        checkpoint of this step, if one is due, is written after the log and so never.
        """
        overflown = not math.isfinite(figures.get("grad_norm", 0))
        self.skipped = self.skipped + 1 if overflown else 0
        self.finite = self.finite if overflown else step
        if not math.isfinite(figures.get("loss", 0)):
            what, first = f"loss is NaN or infinite at step {step}", step
        elif overflown and (not scaled or self.skipped == SKIPPED):
            what, first = f"grad_norm is NaN or infinite at step {step}", self.finite + 1
        else:
            return
        raise Failed(
            f"stopped: {what}, most likely from a learning rate that is too high (in float16 also from an overflow): lower it "
            f"(last good checkpoint: {last_checkpoint(self.output, upto=first - 1) or 'none, set save_steps'})"
        )

    def _show(self, step: int, figures: live_table.Figures, seconds: float) -> None:
        """The table where a person looks on, else a line every twentieth of the run."""
        self.seen = [*self.seen, (step, figures)][-live_table.ROWS :]
        self.advance(0, below=live_table.table(self.seen))
        if not console.is_terminal and (step % max(1, self.steps // live_table.LINES) == 0 or step == self.steps):
            remaining = live_table.left(seconds, step - self.first, self.steps - step)
            console.print(live_table.line(self.stage, step, self.steps, figures, remaining), markup=False, highlight=False, soft_wrap=True)

    def _tell(self, ringing: Sequence[Alarm], step: int) -> None:
        """Warn of each alarm with its cause; raises Failed for a collapse, naming the last checkpoint before it.

        A step's figures are those of the weights that the step before it left: they were good up to two steps before the first bad one.
        """
        for alarm in ringing:
            told = f"{alarm.name}, {self.alarms.patience} steps running up to step {step}: {alarm.cause}"
            if alarm.collapse:
                good = last_checkpoint(self.output, upto=step - self.alarms.patience - 1)
                raise Failed(f"stopped, {told} (last good checkpoint: {good or 'none, set grpo.save_steps'})")
            console.print(f"warning: {told}", markup=False, style="yellow")

    def save_adapter(self, model: nn.Module) -> None:
        """Save beside and rename: `adapter/` exists only when it is whole."""
        temporary = self.output / ".adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, selected_adapters=["default"])  # with grpo.beta TRL keeps where it began beside it
        temporary.replace(self.output / "adapter")
