"""Cold start: supervised fine-tuning of a LoRA adapter on labelled rows, with TRL's SFTTrainer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from sbtiny.budget.protocol import BUDGET_CLOSE, BUDGET_OPEN
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.models.prompt import check_texts, prompt_ids
from sbtiny.rollout.policy import Policy
from sbtiny.coldstart import contrast
from sbtiny.training import logprobs
from sbtiny import distributed
from sbtiny.training.arguments import adapter_in_float32, common
from sbtiny.training.checkpoint import Sealer
from sbtiny.coldstart.sampler import Together
from sbtiny.coldstart.rows import Labelled, place, tokenized
from sbtiny.training.monitor import Watch

ALIKE, MANY = 0.995, 50  # cosine, and so many rows of an output embedding are alike only where none was ever trained


def prepare(policy: Policy, rows: Sequence[dict[str, Any]], settings: Settings) -> Dataset:
    """Token rows for TRL, with the id of the question each answers, and the rival answer to it that each is held against.

    Raises InputError for a row that is too long: it would lose its end in silence.
    """
    turn_end, max_length = policy.tokenizer.eos_token_id, settings.sft.max_length
    ready = []
    check_texts(policy.tokenizer, [Labelled(row, place(row)) for row in rows])
    for row in rows:
        prompt = prompt_ids(policy.tokenizer, row["question"], row.get("system"))
        example = tokenized(policy.encode, row, turn_end, prompt, policy.form)
        if len(example["input_ids"]) > max_length:
            raise InputError(
                f"{place(row)} has {len(example['input_ids'])} tokens, over sft.max_length {max_length}: raise it or drop the row"
            )
        ready.append(example | {"question": row["id"]})
    if not ready:
        raise InputError("no rows to train on")
    return Dataset.from_list(contrast.rivalled(ready))


def check_tags(policy: Policy) -> None:
    """Raises InputError for a tag with a token that no text of the pretraining had: LoRA leaves the head alone, which cannot tell it apart.

    The rows of such tokens never moved away from each other, (vocabulary, width).
    """
    rows = functional.normalize(policy.model.get_output_embeddings().weight.detach().float(), dim=1)
    for tag in (BUDGET_OPEN, BUDGET_CLOSE, policy.form.opening, policy.form.closing):
        for token in policy.encode(tag):
            if int((rows @ rows[token] > ALIKE).sum()) > MANY:
                raise InputError(
                    f"this model cannot learn to write {tag}: its pretraining never met {policy.tokenizer.decode([token])!r}; "
                    "use --format solution, or another model"
                )


def arguments(settings: Settings, output: Path, updates: int) -> SFTConfig:
    s = settings.sft
    micro, passes = distributed.share(s.batch, s.micro_batch, "sft.batch")
    return SFTConfig(
        **common(settings, output, s.save_steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        max_steps=updates,
        learning_rate=s.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(s.warmup * updates),
        max_length=None,
        completion_only_loss=True,
        logging_steps=5 if updates >= 100 else 1,
    )


class Trainer(SFTTrainer):
    """TRL's, with rows in our order, and each held against its rival with `weight`."""

    weight = 0.0  # of the contrast

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "body_at", "rival", "lead"]))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        compared = inputs.pop("contrast", None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if compared is None:
            return loss
        apart = contrast.loss(model, compared)
        self._metrics["train"]["contrast"].append(apart.item())
        return loss + self.weight * apart / self.current_gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        rows = self.train_dataset
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * distributed.count()
        return Together([len(ids) for ids in rows["input_ids"]], rows["question"], batch, self.args.seed)


def updates_planned(settings: Settings, rows: int) -> int:
    s = settings.sft
    return s.steps or max(1, math.ceil(rows * s.epochs / s.batch))


def train(
    policy: Policy,
    dataset: Dataset,
    settings: Settings,
    output: Path,
    matters: dict[str, Any],
    resume: Path | None = None,
) -> None:
    """Train the policy's adapter (its model must be a PEFT model) on prepared rows and save it as `output/adapter`."""
    updates = updates_planned(settings, len(dataset))
    logprobs.ensure()
    watch = Watch("sft", updates, output)
    weight = settings.sft.contrast
    with adapter_in_float32(policy.model):
        trainer = Trainer(
            model=policy.model,
            args=arguments(settings, output, updates),
            train_dataset=dataset,
            processing_class=policy.tokenizer,
            data_collator=contrast.Collator(policy.tokenizer.pad_token_id) if weight else None,
            callbacks=[watch, Sealer(matters)],
        )
    trainer.weight = weight
    watch.run(trainer, resume)
