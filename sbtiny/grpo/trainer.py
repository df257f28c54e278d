"""Budget-guided GRPO (paper section 4): TRL's GRPOTrainer over `Rollouts`, with micro-batches of answers of like length."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from sbtiny import distributed
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.grpo.alarms import Alarms, GrpoMonitor
from sbtiny.grpo.group_reward import GroupReward
from sbtiny.grpo.padding import sort_by_length, trim_padding
from sbtiny.grpo.rollouts import Rollouts
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier
from sbtiny.training.arguments import keep_adapter_float32, shared_training_args
from sbtiny.training.checkpoint import ManifestCallback, read_saved_state
from sbtiny.training.cpu import prepare_for_cpu
from sbtiny.training.rewritten import choose_trainer

if TYPE_CHECKING:
    from peft import PeftModel


def train_grpo(
    policy: Policy,
    questions: Sequence[Question],
    verify: Verifier,
    b_max: dict[str, float],
    settings: Settings,
    output: Path,
    signature: dict[str, Any],
    resume: Path | None = None,
    reward: GroupReward | None = None,
) -> None:
    """Train the policy's adapter on `questions` in their order, `grpo.prompts_per_step` a step, and save it as `output/adapter`.

    `b_max` by question id, in tokens; `signature` is what a resumed run must match; `reward` replaces the paper's.
    """
    saved = read_saved_state(resume) if resume else {}
    rollouts = Rollouts(policy, questions, verify, b_max, settings, output, reward)
    rollouts.shortest = saved.get("shortest", {})
    alarms = Alarms(**saved.get("alarms", {}) | {"patience": settings.grpo.alarm_patience})

    def state_to_save() -> dict[str, Any]:
        """What a resumed run needs beside TRL's state, and alpha for a reader."""
        return {"alpha": rollouts.metrics.get("alpha"), "shortest": rollouts.shortest, "alarms": asdict(alarms)}

    prepare_for_cpu(policy.model)
    if "ref" in policy.model.peft_config:  # left by an attempt that ran out of memory; TRL adds it again
        policy.model.delete_adapter("ref")
    monitor = GrpoMonitor(settings.grpo.steps, output, alarms)
    with keep_adapter_float32(policy.model):
        trainer = choose_trainer(BudgetGrpoTrainer)(
            model=policy.model,
            reward_funcs=rollouts.reward,
            args=build_grpo_config(settings, output),
            train_dataset=Dataset.from_list([{"prompt": q.id} for q in order_questions(questions, settings)]),
            processing_class=policy.tokenizer,
            rollout_func=rollouts,
            callbacks=[monitor, ManifestCallback(signature, state_to_save)],
        )
    if settings.grpo.beta:
        add_reference(policy.model)
    monitor.run(trainer, resume)


def add_reference(model: "PeftModel") -> None:
    """Copy the adapter as `ref`, the policy that the KL penalty measures from, where the trainer has not.

    TRL does so. The trainer that unsloth writes does not, and would measure from the base model, which states no budget.
    """
    if "ref" in model.peft_config:
        return
    model.add_adapter("ref", model.peft_config["default"])
    for name, weight in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(weight.data)


def order_questions(questions: Sequence[Question], settings: Settings) -> list[Question]:
    """The questions of all steps: first in their order, then in rounds shuffled by seed and round.

    One list covers the whole run, because TRL's sampler forgets on resume how many epochs it has shuffled.
    """
    needed, order, rounds = settings.grpo.steps * settings.grpo.prompts_per_step, list(questions), count(1)
    while len(order) < needed:
        order += random.Random(f"{settings.seed}/round {next(rounds)}").sample(questions, len(questions))
    return order[:needed]


def build_grpo_config(settings: Settings, output: Path) -> GRPOConfig:
    """TRL's arguments."""
    g, (micro, passes) = settings.grpo, split_step(settings)
    return GRPOConfig(
        **shared_training_args(settings, output, g.save_steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_generations=g.num_generations,
        max_completion_length=g.max_tokens,
        max_steps=g.steps,
        learning_rate=g.learning_rate,
        lr_scheduler_type=g.lr_scheduler_type,
        max_grad_norm=g.max_grad_norm,
        warmup_steps=math.ceil(g.warmup * g.steps),
        beta=g.beta,
        loss_type=g.loss_type,
        temperature=g.temperature,
        shuffle_dataset=False,
        logging_steps=1,
    )


def split_step(settings: Settings) -> tuple[int, int]:
    """Answers of a forward pass, and passes of an update. Raises InputError if the processes cannot share a step evenly."""
    g = settings.grpo
    if g.prompts_per_step % distributed.world_size():
        hint = f"{distributed.world_size()} processes cannot share its groups, set it to a multiple"
        raise InputError(f"grpo.prompts_per_step is {g.prompts_per_step}: {hint}")
    return distributed.split_batch(g.prompts_per_step * g.num_generations, g.micro_batch, "grpo.prompts_per_step x grpo.num_generations")


class BudgetGrpoTrainer(GRPOTrainer):
    """TRL's trainer, with answers of like length in one micro-batch and padding columns cut off.

    TRL shuffles a step's answers and pads all to the longest. Lengths are heavy-tailed, so most of that work is padding. The loss is
    the same: `bnpo`, which averages over a micro-batch's tokens, keeps TRL's order.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's would take the place of the run's README.md at every checkpoint."""

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or self.loss_type == "bnpo":
            return inputs
        self._buffered_inputs = sort_by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return super().compute_loss(model, trim_padding(inputs), *args, **kwargs)
