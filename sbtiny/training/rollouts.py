"""The rollouts of budget-guided GRPO: which requests a step makes, what each answer earns, and which answers are retold.

The reward is the paper's (section 3). The dead zone (section 8 of the notes on it) and the way out: PreB is flat outside
|l - b| <= a b, and as alpha falls the window closes on budgets that are far from the length; every answer of a group then earns
the same and nothing pulls the number to the truth. So once alpha is below 1, some correct answers of a group are *retold*: the
number in front of them is replaced by the one they really needed (hindsight relabelling, Andrychowicz et al. 2017). The reward
stays as it is; every group then holds an answer inside the window, whatever the policy says, and the advantage does the rest.
The retold number may be one the policy would never have sampled, which is the point: its gradient is that of a policy-gradient
step with the probability taken under the present policy.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from sbtiny.budget.protocol import prefill
from sbtiny.budget.reward import Reward, RewardConfig, linear_alpha, mismatch, score
from sbtiny.config import GrpoSettings, Settings
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode, Request, read_episode
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.runs import append_jsonl
from sbtiny.tasks.sources import Question

Verify = Callable[[str, Question], bool]
USER_ALPHA = 0.5  # width of the window for prefilled budgets while alpha is wider
# A prefilled number cannot move to the length, so the length must be drawn to it from anywhere: a long slope, no b_max to spare.
USER_REWARD = RewardConfig(r_b=0.0, slope=0.5, centre=1.0)


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
        return mismatch(self.episode.length, budget) if budget else math.inf


def alpha_at(step: int, g: GrpoSettings) -> float:
    """The paper's linear schedule over the first (1 - alpha_hold) of the planned steps, then alpha_end."""
    return linear_alpha(step, max(1, round(g.steps * (1 - g.alpha_hold))), g.alpha_start, g.alpha_end)


def initial_lengths(
    policy: Policy, questions: Sequence[Question], verify: Verify, settings: Settings
) -> dict[str, float]:
    """b_max of each question id: the length of the initial model's own answer, infinity when that was wrong (paper section 3).

    The initial model is the policy without its adapter.
    """
    room, seed = settings.grpo.max_tokens, settings.seed * 7_919
    requests = [policy.request(q.question, room, seed + i) for i, q in enumerate(questions)]
    with policy.model.disable_adapter():
        policy.refresh()
        with bar("lengths of the initial model", len(requests)) as advance:
            episodes = policy.sample(requests, Sampling(settings.data.temperature), lambda *_: advance())
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
        self.reward_config = RewardConfig(slope=self.g.slope, centre=self.g.centre)
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
        factors = [math.exp(rng.uniform(math.log(self.g.user_low), math.log(self.g.user_high))) for _ in users]
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
        config = USER_REWARD if user else self.reward_config
        reward = score(
            budget=budget, length=episode.length, correct=correct, b_max=b_max, alpha=width, config=config
        )
        return Scored(episode, question, correct, reward)

    def _retell(self, scored: list[Scored], group: range) -> None:
        """Replace the number of the `hindsight` shortest correct self-set answers, where it was missed, by the one they needed.

        The shortest, because their length is what the question takes; the longest would teach the number of a waste.
        """
        told = [i for i in group if scored[i].correct and scored[i].episode.budget]
        own = [i for i in told if scored[i].episode.source == "self"]
        shortest = sorted(own, key=lambda i: scored[i].episode.length)[: self.g.hindsight]
        for i in (i for i in shortest if scored[i].mismatch > self.g.alpha_end):
            old = scored[i]
            budget = needed(old.episode.length, self.g.alpha_end, self.g.centre)
            episode = retold(self.policy, old.episode, budget)
            scored[i] = replace(self._score(old.question, episode, self.metrics["alpha"]), retold=True)

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


def needed(length: int, alpha: float, centre: float) -> int:
    """The best budget for a correct answer of this length at the tightest window: the largest b with b - l <= (1 - centre) alpha b."""
    return max(1, length, math.floor(length / (1 - alpha * (1 - centre))))


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
