"""Watch a training run: progress bar and live table, metrics.jsonl, a stop on NaN, the saved adapter."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sbtiny import distributed
from sbtiny.errors import Failed
from sbtiny.progress import bar, console
from sbtiny.rollout.memory import peak_bytes
from sbtiny.runs import append_jsonl, sync_files
from sbtiny.training import live_table
from sbtiny.training.checkpoint import last_checkpoint, step_of

MAX_SKIPPED_UPDATES = 20  # the scale is then 2**20 times lower: no scale will do
DROPPED_KEYS = ("num_tokens", "train_loss", "total_flos")  # sums that TRL starts again at 0 on resume, or that are not counted


class TrainingMonitor(TrainerCallback):
    """Shows the last steps below a progress bar and writes every log to metrics.jsonl. A subclass may add to it."""

    def __init__(self, stage: str, steps: int, output: Path) -> None:
        self.stage, self.steps, self.output = stage, steps, output
        self.started, self.first = time.perf_counter(), 0
        self.skipped = 0  # consecutive logged updates with a NaN or infinite gradient
        self.finite = 0  # the last step before them
        self.seen: list[tuple[int, live_table.StepMetrics]] = []
        self.printed = 0  # the last step with a line

    def run(self, trainer: Trainer, resume: Path | None) -> None:
        """Train from the start or from checkpoint `resume`, then save the adapter. After the last step there is only that to save."""
        trainer.remove_callback(PrinterCallback)  # it prints each log as a dictionary; the table replaces it
        if resume:  # transformers does not load it where TRL keeps a second adapter (grpo.beta above 0)
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(resume), device=str(trainer.model.device)))
        if not resume or step_of(resume) < self.steps:
            with bar(self.stage, self.steps) as self.advance:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if distributed.is_main_process():
            self.save_adapter(trainer.model)
            console.print(f"{self.stage}: peak memory {peak_bytes(trainer.args.device) / 2**30:.2f} GiB", markup=False)
        distributed.wait_for_everyone()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first = self.finite = state.global_step
        self.advance(self.first)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        row = {"stage": self.stage, "step": state.global_step, "seconds": round(time.perf_counter() - self.started, 2)}
        metrics = {key: value for key, value in logs.items() if value is not None and key not in DROPPED_KEYS}
        metrics["peak_gb"] = round(peak_bytes(args.device) / 2**30, 2)
        additions = self.extra_metrics(metrics)
        if distributed.is_main_process():
            append_jsonl(self.output / "metrics.jsonl", row | metrics | additions)
        self._check_finite(metrics, args.fp16, state.global_step)
        if "loss" in metrics or "reward" in metrics:
            self._draw(state.global_step, metrics, row["seconds"])
        self.after_log(state.global_step, control)

    def extra_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Entries to add to the step's row of metrics.jsonl."""
        return {}

    def after_log(self, step: int, control: TrainerControl) -> None:
        """Act on the judgement of a step, after it is written and shown."""

    def _check_finite(self, figures: live_table.StepMetrics, scaled: bool, step: int) -> None:
        """Raise Failed for a NaN or infinite loss or gradient: the weights after it are useless.

        `scaled`: float16's scaler skips an update whose gradient overflows and lowers its scale, up to MAX_SKIPPED_UPDATES times in a row.
        A checkpoint of this step is written after the log, so it is never written.
        """
        overflow = not math.isfinite(figures.get("grad_norm", 0))
        self.skipped = self.skipped + 1 if overflow else 0
        self.finite = self.finite if overflow else step
        if not math.isfinite(figures.get("loss", 0)):
            what, first = f"loss is NaN or infinite at step {step}", step
        elif overflow and (not scaled or self.skipped == MAX_SKIPPED_UPDATES):
            what, first = f"grad_norm is NaN or infinite at step {step}", self.finite + 1
        else:
            return
        raise Failed(
            f"stopped: {what}, most likely from a learning rate that is too high (in float16 also from an overflow): lower it "
            f"(last good checkpoint: {last_checkpoint(self.output, upto=first - 1) or 'none, set save_steps'})"
        )

    def _draw(self, step: int, figures: live_table.StepMetrics, seconds: float) -> None:
        """Draw the table; without a terminal, print LINES lines over the whole run."""
        self.seen = [*self.seen, (step, figures)][-live_table.ROWS :]
        self.advance(0, below=live_table.metrics_table(self.seen))
        every = max(1, self.steps // live_table.LINES)
        if not console.is_terminal and (step // every > self.printed // every or step == self.steps):
            self.printed = step
            remaining = live_table.time_left(seconds, step - self.first, self.steps - step)
            console.print(
                live_table.metrics_line(self.stage, step, self.steps, figures, remaining), markup=False, highlight=False, soft_wrap=True
            )

    def save_adapter(self, model: nn.Module) -> None:
        """Save to a temporary folder and rename it: `adapter/` exists only when it is whole."""
        temporary = self.output / ".adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, selected_adapters=["default"])  # without the second adapter of TRL (grpo.beta above 0)
        sync_files(temporary.iterdir())
        temporary.replace(self.output / "adapter")
