"""Budget-guided GRPO: TRL's GRPOTrainer over our rollouts, with micro-batches that waste no time on padding (paper section 4)."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.training import logprobs
from sbtiny import distributed
from sbtiny.grpo.alarms import Alarms
from sbtiny.training.arguments import adapter_in_float32, common
from sbtiny.training.checkpoint import Sealer, state_of
from sbtiny.grpo.rollouts import Rollouts, Verify
from sbtiny.grpo.group_reward import GroupReward
from sbtiny.training.monitor import Watch


class Trainer(GRPOTrainer):
    """TRL shuffles the answers of a step into micro-batches that are all padded to the longest of the step.

    With heavy-tailed lengths most of the work is then padding. Answers of like length side by side, and columns that are all padding cut
    away, give the same loss for a fraction of the time.
    """

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return super().compute_loss(model, trimmed(inputs), *args, **kwargs)


def by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in micro-batches of like completion length; each batch keeps its number of rows."""
    sizes = [len(batch["completion_mask"]) for batch in batches]
    rows = {
        name: torch.cat([batch[name] for batch in batches])
        for name, value in batches[0].items()
        if isinstance(value, Tensor) and value.ndim > 0
    }
    order = rows["completion_mask"].sum(1).argsort(stable=True)
    parts = {name: value[order].split(sizes) for name, value in rows.items()}
    return [batch | {name: parts[name][i] for name in rows} for i, batch in enumerate(batches)]


def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Cut columns that are padding in every row: prompts are padded on the left, completions on the right."""
    prompt, completion = inputs["prompt_mask"].sum(1).max(), inputs["completion_mask"].sum(1).max()
    width = inputs["prompt_mask"].shape[1] - prompt

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] == 1:
            return value
        return value[:, width:] if name.startswith("prompt") else value[:, :completion]

    return {name: cut(name, value) for name, value in inputs.items()}


def arguments(settings: Settings, output: Path) -> GRPOConfig:
    """TRL's arguments from prompts a step and group size; the batch algebra is derived."""
    g = settings.grpo
    if g.prompts % distributed.count():
        raise InputError(f"grpo.prompts is {g.prompts}: {distributed.count()} processes cannot share its groups, set it to a multiple")
    micro, passes = distributed.share(g.prompts * g.group, g.micro_batch, "grpo.prompts x grpo.group")
    return GRPOConfig(
        **common(settings, output, g.save_steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_generations=g.group,
        max_completion_length=g.max_tokens,
        max_steps=g.steps,
        learning_rate=g.lr,
        lr_scheduler_type=g.decay,
        max_grad_norm=g.clip,
        warmup_steps=math.ceil(g.warmup * g.steps),
        beta=g.beta,
        loss_type=g.loss,
        temperature=g.temperature,
        shuffle_dataset=False,
        logging_steps=1,
    )


def in_turn(names: Sequence[str], settings: Settings) -> list[str]:
    """Question ids of all steps, one after another: in their order first, then in rounds shuffled by seed and round.

    One list over the whole run, for TRL's own sampler forgets on resume how many epochs it has shuffled.
    """
    needed, order = settings.grpo.steps * settings.grpo.prompts, list(names)
    for number in count(1):
        if len(order) >= needed:
            return order[:needed]
        order += random.Random(f"{settings.seed}/round {number}").sample(names, len(names))


def kept(rollouts: Rollouts, alarms: Alarms) -> dict[str, Any]:
    """What a checkpoint must hold beside TRL's: alpha for a reader, the shortest answers seen, what the alarms have seen."""
    return {"alpha": rollouts.metrics.get("alpha"), "shortest": rollouts.shortest, "alarms": asdict(alarms)}


def train(
    policy: Policy,
    questions: Sequence[Question],
    verify: Verify,
    b_max: dict[str, float],
    settings: Settings,
    output: Path,
    matters: dict[str, Any],
    resume: Path | None = None,
    reward: GroupReward | None = None,
) -> None:
    """Train the policy's adapter and save it as `output/adapter`; `questions` are taken in their order, `grpo.prompts` a step.

    `reward` takes the place of the paper's.
    """
    alarms = Alarms(patience=settings.grpo.patience)
    rollouts = Rollouts(policy, questions, verify, b_max, settings, output, reward)
    if resume:
        before = state_of(resume)
        rollouts.shortest = before["shortest"]
        alarms = Alarms(**before["alarms"] | {"patience": settings.grpo.patience})
    logprobs.ensure()
    if "ref" in policy.model.peft_config:  # of an attempt that ran out of memory; TRL adds it again
        policy.model.delete_adapter("ref")
    watch = Watch("grpo", settings.grpo.steps, output, alarms)
    with adapter_in_float32(policy.model):
        trainer = Trainer(
            model=policy.model,
            reward_funcs=rollouts.reward,
            args=arguments(settings, output),
            train_dataset=Dataset.from_list([{"prompt": name} for name in in_turn([q.id for q in questions], settings)]),
            processing_class=policy.tokenizer,
            rollout_func=rollouts,
            callbacks=[watch, Sealer(matters, lambda: kept(rollouts, alarms))],
        )
    watch.run(trainer, resume)
