"""Cold start: supervised fine-tuning of a LoRA adapter on labelled rows, with TRL's SFTTrainer."""

import json
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from sbtiny import distributed
from sbtiny.budget.protocol import BUDGET_CLOSE, BUDGET_OPEN, render_budget
from sbtiny.coldstart import contrast
from sbtiny.coldstart.rows import LabelledRow, row_location, tokenize_row
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.models.prompt import check_texts, prompt_ids
from sbtiny.progress import print_line
from sbtiny.rollout.policy import Policy
from sbtiny.training.arguments import keep_adapter_float32, shared_training_args
from sbtiny.training.checkpoint import ManifestCallback
from sbtiny.training.cpu import prepare_for_cpu
from sbtiny.training.monitor import TrainingMonitor
from sbtiny.training.rewritten import choose_trainer

POOL_BATCHES = 50  # batches sorted together: enough for like lengths, few enough to mix rows anew each epoch
UNTRAINED_COSINE, UNTRAINED_NEIGHBOURS = 0.995, 50  # a token with more neighbours above this cosine was never trained


def build_dataset(policy: Policy, rows: Sequence[dict[str, Any]], settings: Settings) -> Dataset:
    """Tokenized rows for TRL, each with its question's id and its rival.

    Raises InputError for a row over `sft.max_length`, which would lose its end, and without rows.
    """
    turn_end, max_length = policy.tokenizer.eos_token_id, settings.sft.max_length
    examples = []
    check_texts(policy.tokenizer, [LabelledRow(row, row_location(row)) for row in rows])
    for row in rows:
        prompt = prompt_ids(policy.tokenizer, row["question"], row.get("system"))
        example = tokenize_row(policy.encode, row, turn_end, prompt, policy.form)
        if len(example["input_ids"]) > max_length:
            raise InputError(
                f"{row_location(row)} has {len(example['input_ids'])} tokens, over sft.max_length {max_length}: raise it or drop the row"
            )
        asked = (row["id"], row["question"], row.get("system") or "", "" if row["response"] is not None else "its budget")
        examples.append(example | {"question": json.dumps(asked)})  # files put together may number their questions alike
    if not examples:
        raise InputError("no rows to train on")
    return Dataset.from_list(
        contrast.add_negatives(examples, lambda budget: policy.encode(render_budget(budget, policy.form)), settings.seed)
    )


def check_tags_learnable(policy: Policy) -> None:
    """Raises InputError if a tag contains an untrained token. LoRA does not train the output head, so it cannot be learnt.

    The embeddings of untrained tokens never moved away from each other.
    """
    embeddings = functional.normalize(policy.model.get_output_embeddings().weight.detach().float(), dim=1)  # (vocabulary, width)
    for tag in (BUDGET_OPEN, BUDGET_CLOSE, policy.form.opening, policy.form.closing):
        for token in policy.encode(tag):
            if int((embeddings @ embeddings[token] > UNTRAINED_COSINE).sum()) > UNTRAINED_NEIGHBOURS:
                raise InputError(
                    f"this model cannot learn to write {tag}: its pretraining never met {policy.tokenizer.decode([token])!r}; "
                    "use --format solution, or another model"
                )


def build_sft_config(settings: Settings, output: Path, updates: int) -> SFTConfig:
    s = settings.sft
    micro, passes = distributed.split_batch(s.batch, s.micro_batch, "sft.batch")
    return SFTConfig(
        **shared_training_args(settings, output, s.save_steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        max_steps=updates,
        learning_rate=s.learning_rate,
        max_grad_norm=s.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(s.warmup * updates),
        max_length=None,
        completion_only_loss=True,
        logging_steps=5 if updates >= 100 else 1,
    )


class GroupedLengthSampler(Sampler[int]):
    """Row indices, batch after batch. The order follows from seed and epoch alone, so that a stopped run resumes exactly.

    Rows of one question must be neighbours in `questions`; where their count divides `batch` they share one. In its gradient they then
    differ by budget and length alone.
    In batches of one length each, the length is learnt long before the budget is read. Rows of a batch are sorted by length, for little
    padding in micro-batches.

    `alone`: rows of a budget alone. Beside hundreds of tokens of answers their few digits would hardly count, so they have batches of their
    own, but for what is left at an epoch's end.
    """

    def __init__(self, lengths: Sequence[int], questions: Sequence[Hashable], alone: Sequence[bool], batch: int, seed: int) -> None:
        self.lengths, self.alone, self.batch, self.seed, self.epoch = lengths, alone, batch, seed, 0
        self.units = [list(rows) for _, rows in groupby(range(len(lengths)), key=questions.__getitem__)]

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        units, size = rng.sample(self.units, len(self.units)), self.batch
        pool = max(1, POOL_BATCHES * size * len(units) // max(1, len(self)))  # in units; about POOL_BATCHES batches of rows
        batches, rest = [], []
        for start, alone in product(range(0, len(units), pool), (False, True)):
            chosen = [unit for unit in units[start : start + pool] if self.alone[unit[0]] is alone]
            rows = [row for unit in sorted(chosen, key=self._size) for row in unit]
            whole = len(rows) // size * size
            batches += [rows[first : first + size] for first in range(0, whole, size)]
            rest += rows[whole:]
        rest.sort(key=self.alone.__getitem__)
        rng.shuffle(batches)
        batches += [rest[first : first + size] for first in range(0, len(rest), size)]  # the short batch last: the loader cuts by count
        return iter([row for batch in batches for row in sorted(batch, key=self.lengths.__getitem__)])

    def _size(self, unit: Sequence[int]) -> tuple[bool, int, int]:
        """Sort key of a question's rows: counts that divide a batch before those that would shift it, the most first; then the longest."""
        return self.batch % len(unit) > 0, -len(unit), max(self.lengths[row] for row in unit)


class ColdStartTrainer(SFTTrainer):
    """TRL's SFTTrainer with `GroupedLengthSampler` and the contrast loss."""

    contrast_weight, contrast_steps = 0.0, 0  # the updates from the first on that have the contrast
    pairs = 0.0  # compared in this update, the mean over the processes

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's would take the place of the run's README.md at every checkpoint."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0, as transformers logs it: nothing reads the sum, and counting takes a hundredth of an update of the bundled model."""
        return 0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "body_at", "rival", "compared"]))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """All micro-batches of an update. Their pairs are counted here: the contrast is a mean over the update, however it is split.

        Processes average their gradients, so each divides by the pairs of an average process.
        """
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.state.global_step < self.contrast_steps:
            pairs = sum(len(batch["contrast"]["input_ids"]) for batch in samples if "contrast" in batch)
            self.pairs = sum(distributed.gather([pairs])) / distributed.world_size()
        return samples, items

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        rivals = inputs.pop("contrast", None)
        if rivals is None or self.state.global_step >= self.contrast_steps:
            return super().compute_loss(model, inputs, *args, **kwargs)
        compared, passes = rivals.pop("compared"), []
        with model.register_forward_hook(lambda _module, _inputs, outputs: passes.append(outputs)):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        plain = self.accelerator.unwrap_model(model)  # other processes would wait in it for one whose rows have no rival
        read = partial(plain, use_cache=False, fused_lm_head=True)
        own = passes[0] if "log_probs" in passes[0] else read(**inputs)  # unsloth's trainer computes a loss alone
        losses = contrast.contrast_losses(own.log_probs, read(**rivals).log_probs, compared)
        self._metrics["train"]["contrast"].extend(losses.tolist())
        return loss + self.contrast_weight * losses.sum() / self.pairs

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log the contrast of all processes: rows are sorted, so the first process has the shortest."""
        if losses := distributed.gather(self._metrics["train"].pop("contrast", [])):
            self._metrics["train"]["contrast"] = losses
        super().log(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        rows = self.train_dataset
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * distributed.world_size()
        lengths = [len(ids) for ids in rows["input_ids"]]
        alone = [body_at == length for body_at, length in zip(rows["body_at"], lengths, strict=True)]
        return GroupedLengthSampler(lengths, rows["question"], alone, batch, self.args.seed)


def planned_updates(settings: Settings, rows: int) -> int:
    s = settings.sft
    return s.steps or max(1, math.ceil(rows * s.epochs / s.batch))


def train_sft(
    policy: Policy,
    dataset: Dataset,
    settings: Settings,
    output: Path,
    signature: dict[str, Any],
    resume: Path | None = None,
) -> None:
    """Train the policy's adapter (its model is a PEFT model) on `build_dataset` rows and save it as `output/adapter`.

    `signature` is what a resumed run must match.
    """
    updates = planned_updates(settings, len(dataset))
    prepare_for_cpu(policy.model)
    monitor = TrainingMonitor("sft", updates, output)
    weight = settings.sft.contrast
    with keep_adapter_float32(policy.model):
        trainer = choose_trainer(ColdStartTrainer, "sft.contrast" if weight else "")(
            model=policy.model,
            args=build_sft_config(settings, output, updates),
            train_dataset=dataset,
            processing_class=policy.tokenizer,
            data_collator=contrast.Collator(policy.tokenizer.pad_token_id) if weight else None,
            callbacks=[monitor, ManifestCallback(signature)],
        )
    if weight and not any(dataset["compared"]):
        print_line("sft.contrast compares nothing: no question has two answers whose budgets differ by a quarter")
    trainer.contrast_weight, trainer.contrast_steps = weight, math.ceil(settings.sft.contrast_share * updates) if weight else 0
    monitor.run(trainer, resume)
