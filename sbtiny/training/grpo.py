"""Budget-guided GRPO: TRL's GRPOTrainer, our rollouts, the paper's reward (sections 3 and 4).

The dead zone (paper.md section 8) and the way out of it. PreB is flat outside |l - b| <= a b, and as alpha falls the window closes on
budgets that are far from the length: every answer of a group then earns the same and nothing pulls the number to the truth. So once
alpha is below 1, some correct answers of a group are *retold*: the number in front of them is replaced by the one they really needed
(hindsight relabelling, as in Andrychowicz et al. 2017). The reward stays the paper's; every group holds at least one answer inside the
window, whatever the policy says, and the advantage does the rest. The retold number is one the policy may never have sampled, which is
the point; its probability is taken under the present policy, so the first gradient step is an ordinary policy-gradient step.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from sbtiny.budget.protocol import prefill
from sbtiny.budget.reward import Reward, linear_alpha, score
from sbtiny.config import GrpoSettings, Settings
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode, Request, read_episode
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.runs import append_jsonl
from sbtiny.tasks.sources import Question
from sbtiny.training import head
from sbtiny.training.arguments import common
from sbtiny.training.watch import Watch

Verify = Callable[[str, Question], bool]
USER_FACTORS = (
    0.5,
    4.0,
)  # a prefilled budget is drawn between these multiples of the model's own, evenly in the logarithm
USER_ALPHA = 0.5  # width of the window for prefilled budgets while alpha is wider


@dataclass(slots=True)
class Scored:
    """An episode with what was asked of it and what it earned."""

    episode: Episode
    question: Question
    correct: bool
    reward: Reward
    retold: bool = False

    @property
    def mismatch(self) -> float:
        """|l - b| / b, infinite when malformed."""
        budget = self.episode.budget
        return abs(self.episode.length - budget) / budget if budget else math.inf


def alpha_at(step: int, g: GrpoSettings) -> float:
    """The paper's linear schedule over the first (1 - alpha_hold) of the planned steps, then alpha_end."""
    return linear_alpha(step, max(1, round(g.steps * (1 - g.alpha_hold))), g.alpha_start, g.alpha_end)


def initial_lengths(
    policy: Policy, questions: Sequence[Question], verify: Verify, g: GrpoSettings, seed: int
) -> dict[str, float]:
    """b_max of each question id: the length of the initial model's own answer, infinity when that was wrong (paper section 3).

    The initial model is the policy without its adapter.
    """
    requests = [policy.request(q.question, g.max_tokens, seed=seed * 7_919 + i) for i, q in enumerate(questions)]
    with policy.model.disable_adapter():
        policy.refresh()
        with bar("lengths of the initial model", len(requests)) as advance:
            episodes = policy.sample(requests, Sampling(temperature=g.temperature), lambda *_: advance())
    policy.refresh()
    pairs = zip(questions, episodes, strict=True)
    return {q.id: float(e.length) if e.stop_reason == "end" and verify(e.solution, q) else math.inf for q, e in pairs}


class Rollouts:
    """TRL's `rollout_func`: samples the groups of a step, verifies, scores, retells, and keeps the figures of the step."""

    def __init__(
        self,
        policy: Policy,
        questions: Sequence[Question],
        verify: Verify,
        b_max: dict[str, float],
        settings: Settings,
        output: Path,
    ) -> None:
        self.policy, self.verify, self.b_max, self.output = policy, verify, b_max, output
        self.questions = {q.id: q for q in questions}
        self.g, self.seed = settings.grpo, settings.seed
        self.metrics: dict[str, float] = {}

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """`prompts` are question ids, each already repeated once per answer of its group."""
        step, started = trainer.state.global_step, time.perf_counter()
        self.policy.refresh()
        alpha = alpha_at(step, self.g)
        asked = [self.questions[name] for name in prompts]
        requests = self._requests(asked, step)
        episodes = self.policy.sample(requests, Sampling(temperature=self.g.temperature))
        scored = [self._score(q, e, alpha) for q, e in zip(asked, episodes, strict=True)]
        self.metrics = summary(scored, alpha, time.perf_counter() - started)
        if step % self.g.sample_steps == 0:
            self._keep(step, scored)
        if alpha < 1:
            for start in range(0, len(scored), self.g.group):
                self._retell(scored, range(start, start + self.g.group))
        self._tighten(scored)
        return {
            "prompt_ids": [list(s.episode.request.prompt_ids) for s in scored],
            "completion_ids": [s.episode.completion_ids for s in scored],
            "logprobs": None,
            "reward": [s.reward.total for s in scored],
        }

    def _requests(self, asked: Sequence[Question], step: int) -> list[Request]:
        """One request an answer; in `user_share` of the groups the budget is prefilled, around the number the model itself would say."""
        rng = random.Random(f"{self.seed}/{step}")
        base = rng.getrandbits(63)
        groups = range(0, len(asked), self.g.group)
        users = [start for start in groups if rng.random() < self.g.user_share]
        said = self._own_budgets([asked[start].question for start in users], base)
        factors = [math.exp(rng.uniform(*map(math.log, USER_FACTORS))) for _ in users]
        given = {start: max(1, round(own * f)) for start, own, f in zip(users, said, factors, strict=True) if own}
        return [
            self.policy.request(
                q.question, self.g.max_tokens, base + i, given.get(i - i % self.g.group), int(self.b_max_of(q))
            )
            for i, q in enumerate(asked)
        ]

    def b_max_of(self, question: Question) -> float:
        value = self.b_max[question.id]
        return value if math.isfinite(value) else self.g.max_tokens

    def _own_budgets(self, questions: Sequence[str], seed: int) -> list[int | None]:
        """The number the model would say to each question: only the tag is sampled."""
        room = len(self.policy.encode(prefill(999_999)))
        requests = [self.policy.request(q, room, seed - 1 - i) for i, q in enumerate(questions)]
        return [e.parsed.budget for e in self.policy.sample(requests, Sampling(self.g.temperature))] if requests else []

    def _score(self, question: Question, episode: Episode, alpha: float) -> Scored:
        """The paper's reward; a budget the user set is not measured against b_max, and its window is narrow from the start."""
        user = episode.source == "user"
        correct = episode.stop_reason == "end" and self.verify(episode.solution, question)
        budget = episode.budget if episode.stop_reason == "end" else None
        b_max = math.inf if user else self.b_max[question.id]
        width = min(alpha, USER_ALPHA) if user else alpha
        return Scored(
            episode,
            question,
            correct,
            score(budget=budget, length=episode.length, correct=correct, b_max=b_max, alpha=width),
        )

    def _retell(self, scored: list[Scored], group: range) -> None:
        """Replace the number of those `hindsight` correct self-set answers that missed theirs most by the one they needed."""
        able = [
            i for i in group if scored[i].correct and scored[i].episode.budget and scored[i].episode.source == "self"
        ]
        able = [i for i in able if scored[i].mismatch > self.g.alpha_end]
        for i in sorted(able, key=lambda i: -scored[i].mismatch)[: self.g.hindsight]:
            old = scored[i]
            episode = retold(self.policy, old.episode, needed(old.episode.length, self.g.alpha_end))
            reward = score(
                budget=episode.budget,
                length=episode.length,
                correct=True,
                b_max=self.b_max[old.question.id],
                alpha=self.metrics["alpha"],
            )
            scored[i] = Scored(episode, old.question, True, reward, retold=True)

    def _tighten(self, scored: Sequence[Scored]) -> None:
        if self.g.tight_bmax:
            for s in scored:
                if s.correct:
                    self.b_max[s.question.id] = min(self.b_max[s.question.id], s.episode.length)

    def _keep(self, step: int, scored: Sequence[Scored]) -> None:
        for s in scored[:: self.g.group]:
            row = {"step": step, "question": s.question.question, "text": s.episode.text, "budget": s.episode.budget}
            append_jsonl(
                self.output / "samples.jsonl",
                row | {"length": s.episode.length, "correct": s.correct, "reward": s.reward.total},
            )

    def reward(
        self, completions: list[str], reward: list[float], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        """TRL's reward function: the rollout has scored already; here the figures of the step reach the log."""
        for name, value in self.metrics.items():
            log_metric(name, value)
        return reward


def needed(length: int, alpha: float) -> int:
    """The best budget for a correct answer of this length at the tightest window: the largest b with b - l <= alpha b."""
    return max(1, length, math.floor(length / (1 - alpha)))


def retold(policy: Policy, episode: Episode, budget: int) -> Episode:
    """The same answer behind another number; tokens of the body and after it are kept as they were sampled."""
    pieces, at, seen = policy.engine.pieces, 0, 0
    while seen < episode.parsed.start:
        seen += len(pieces[episode.completion_ids[at]])
        at += 1
    ids = [*policy.encode(prefill(budget)), *episode.completion_ids[at:]]
    return read_episode(episode.request, ids, pieces, episode.stop_reason)


def summary(scored: Sequence[Scored], alpha: float, seconds: float) -> dict[str, float]:
    """The figures of a step, self-set answers only for those about the number; retelling comes after."""
    own = [s for s in scored if s.episode.source == "self"] or list(scored)
    fine = [s for s in own if s.episode.budget]
    tokens = sum(len(s.episode.completion_ids) for s in scored)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return {
        "alpha": alpha,
        "accuracy": mean([s.correct for s in own]),
        "tokens": mean([s.episode.length for s in own]),
        "budget": mean([s.episode.budget for s in fine]),
        "within_50": mean([s.mismatch <= 0.5 for s in own]),
        "malformed": mean([s.episode.budget is None for s in own]),
        "self_reward": mean([s.reward.total for s in own]),
        "user_within_50": mean([s.mismatch <= 0.5 for s in scored if s.episode.source == "user"]),
        "generate_seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }


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
    answers = g.prompts * g.group
    micro = min(g.micro_batch, answers)
    return GRPOConfig(
        **common(settings, output, g.save_steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=answers // micro,
        steps_per_generation=answers // micro,
        num_generations=g.group,
        max_completion_length=g.max_tokens,
        max_steps=g.steps,
        learning_rate=g.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=math.ceil(g.warmup * g.steps),
        beta=g.beta,
        loss_type=g.loss,
        temperature=g.temperature,
        logging_steps=1,
    )


SHOWN = ("reward", "accuracy", "tokens", "budget", "within_50", "alpha")


def train(
    policy: Policy,
    questions: Sequence[Question],
    verify: Verify,
    b_max: dict[str, float],
    settings: Settings,
    output: Path,
    resume: Path | None = None,
) -> None:
    """Train the policy's adapter and save it as `output/adapter`; `questions` are taken in their order, `grpo.prompts` a step."""
    rollouts = Rollouts(policy, questions, verify, b_max, settings, output)
    head.ensure()
    watch = Watch("grpo", settings.grpo.steps, output, SHOWN)
    trainer = Trainer(
        model=policy.model,
        reward_funcs=rollouts.reward,
        args=arguments(settings, output),
        train_dataset=Dataset.from_list([{"prompt": q.id} for q in questions]),
        processing_class=policy.tokenizer,
        rollout_func=rollouts,
        callbacks=[watch],
    )
    watch.quieten(trainer)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    watch.save_adapter(policy.model)
