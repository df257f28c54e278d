"""The rollouts of budget-guided GRPO: which requests a step makes, what each answer earns, and which answers are retold.

The reward is the paper's (section 3); its dead zone is answered in `hindsight`.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from sbtiny.budget.reward import Reward, RewardConfig, linear_alpha, mismatch, score
from sbtiny.config import GrpoSettings, Settings
from sbtiny.progress import bar
from sbtiny.rollout.control import Limits
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.runs import append_jsonl
from sbtiny.tasks.sources import Question
from sbtiny.training.groups import SELF, Group, Kind, deal, kinds, spread
from sbtiny.training.hindsight import needed, retold

Verify = Callable[[str, Question], bool]
USER_ALPHA = 0.5  # width of the window for prefilled budgets while alpha is wider
# A prefilled number cannot move to the length, so the length must be drawn to it from anywhere: a long slope, no b_max to spare.
USER_REWARD = RewardConfig(r_b=0.0, slope=0.5, centre=1.0)


@dataclass(slots=True)
class Scored:
    """An episode with what was asked of it and what it earned."""

    episode: Episode
    question: Question
    kind: Kind
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
    return {q.id: float(e.length) if e.ended and verify(e.solution, q) else math.inf for q, e in pairs}


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
        self.paper = RewardConfig(slope=self.g.slope, centre=self.g.centre)
        self.wrap_up, self.reserve = tuple(policy.encode(settings.grpo.wrap_up)), settings.grpo.reserve
        self.metrics: dict[str, float] = {}
        self.shortest: dict[str, float] = {}  # correct answers seen, in tokens, by question id

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """`prompts` are question ids, each already repeated once per answer of its group."""
        step, started = trainer.state.global_step, time.perf_counter()
        self.policy.refresh()
        alpha = alpha_at(step, self.g)
        asked = [self.questions[name] for name in prompts[:: self.g.group]]
        groups = self._groups(asked, step)
        first = random.Random(f"{self.seed}/{step}/seeds").getrandbits(63)
        rows = [(q, group) for q, group in zip(asked, groups, strict=True) for _ in range(self.g.group)]
        requests = [self._request(q, group, first + i) for i, (q, group) in enumerate(rows)]
        episodes = self.policy.sample(requests, Sampling(temperature=self.g.temperature))
        scored = self.judge([(q, group.kind) for q, group in rows], episodes, alpha)
        if self.g.replace_flat:
            self._replace_flat(scored, asked, step, alpha)
        self.metrics = summary(scored, alpha, time.perf_counter() - started) | self._warning(scored)
        if step % self.g.sample_steps == 0:
            self._keep(step, scored)
        for start in range(0, len(scored), self.g.group):
            self._retell(scored, range(start, start + self.g.group), alpha)
        return {
            "prompt_ids": [list(s.episode.request.prompt_ids) for s in scored],
            "completion_ids": [s.episode.completion_ids for s in scored],
            "logprobs": None,
            "env_mask": [trained(s) for s in scored],
            "reward": [s.reward.total for s in scored],
        }

    def _groups(self, asked: Sequence[Question], step: int) -> list[Group]:
        """What each group is asked; a user's number lies around the one the model itself would say."""
        rng = random.Random(f"{self.seed}/{step}")
        dealt = kinds(len(asked), self.g, rng)
        led = [q.question for q, kind in zip(asked, dealt, strict=True) if kind != "self"]
        said = iter(self._own_budgets(led, rng.getrandbits(63)))
        return [
            deal(kind, None if kind == "self" else next(said), self.b_max_of(q), self.g, rng)
            for q, kind in zip(asked, dealt, strict=True)
        ]

    def _request(self, question: Question, group: Group, seed: int) -> Request:
        limits = None if group.ceiling is None else Limits(group.ceiling, None, self.wrap_up, self.reserve)
        expected = group.ceiling or group.budget or int(self.b_max_of(question))
        return self.policy.request(question.question, self.g.max_tokens, seed, group.budget, expected, limits)

    def b_max_of(self, question: Question) -> float:
        value = self.b_max[question.id]
        return value if math.isfinite(value) else self.g.max_tokens

    def _own_budgets(self, questions: Sequence[str], seed: int) -> list[int | None]:
        """The number the model would say to each question: only the tag is sampled."""
        requests = [self.policy.budget_request(q, seed - 1 - i) for i, q in enumerate(questions)]
        return [e.parsed.budget for e in self.policy.sample(requests, Sampling(self.g.temperature))] if requests else []

    def judge(self, asked: Sequence[tuple[Question, Kind]], episodes: Sequence[Episode], alpha: float) -> list[Scored]:
        """Verifies all, notes the shortest correct answers, then scores: an answer is measured against its own group as well."""
        correct = [e.ended and self.verify(e.solution, q) for (q, _), e in zip(asked, episodes, strict=True)]
        for (question, _), episode, right in zip(asked, episodes, correct, strict=True):
            if right:
                self.shortest[question.id] = min(self.shortest.get(question.id, math.inf), episode.length)
        judged = zip(asked, episodes, correct, strict=True)
        return [self._score(question, episode, right, alpha, kind) for (question, kind), episode, right in judged]

    def _bound(self, question: Question, alpha: float) -> float:
        """b_max of a self-set budget. Tight: no more than alpha above the shortest correct answer seen, for that is enough."""
        b_max = self.b_max[question.id]
        if math.isinf(b_max):
            b_max = self.g.failed_bmax or math.inf
        return min(b_max, (1 + alpha) * self.shortest.get(question.id, math.inf)) if self.g.tight_bmax else b_max

    def _score(self, question: Question, episode: Episode, correct: bool, alpha: float, kind: Kind) -> Scored:
        """The paper's reward; a budget the user set is not measured against b_max, and its window is narrow from the start.

        An answer that was cut earns by being right alone: how long it would have been was not its choice.
        """
        budget = episode.budget if episode.ended else None
        if kind == "cut":
            reward = finish(budget, correct)
        elif kind == "user":
            width = min(alpha, USER_ALPHA)
            reward = score(
                budget=budget, length=episode.length, correct=correct, b_max=math.inf, alpha=width, config=USER_REWARD
            )
        else:
            b_max = self._bound(question, alpha)
            reward = score(
                budget=budget, length=episode.length, correct=correct, b_max=b_max, alpha=alpha, config=self.paper
            )
        return Scored(episode, question, kind, correct, reward)

    def _replace_flat(self, scored: list[Scored], asked: Sequence[Question], step: int, alpha: float) -> None:
        """Sample each group of equal rewards again, once, with a self-set question that the step does not ask, where there is one."""
        rng, size = random.Random(f"{self.seed}/{step}/again"), self.g.group
        starts = range(0, len(scored), size)
        flat = [start for start in starts if spread([s.reward.total for s in scored[start : start + size]]) == 0]
        taken = {q.id for q in asked}
        spare = [q for q in self.questions.values() if q.id not in taken]
        fresh = rng.sample(spare, min(len(flat), len(spare)))
        rows = [question for question in fresh for _ in range(size)]
        requests = [self._request(question, SELF, rng.getrandbits(63)) for question in rows]
        if not requests:
            return
        again = self.policy.sample(requests, Sampling(temperature=self.g.temperature))
        told = self.judge([(question, "self") for question in rows], again, alpha)
        for number, start in enumerate(flat[: len(fresh)]):
            scored[start : start + size] = told[number * size : (number + 1) * size]

    def _retell(self, scored: list[Scored], group: range, alpha: float) -> None:
        """Tell some correct answers of a group again behind the number they needed, where they missed the one they had.

        Self-set: the shortest, because their length is what the question takes; the longest would teach the number of a waste; and
        only once alpha is below 1, where a window has an upper edge. A user's: any, so that all lengths are met; but none where the
        number is below every answer, for beside a retold one the nearest to it would look bad.
        """
        kind = scored[group.start].kind
        right = [i for i in group if scored[i].correct and scored[i].episode.budget]
        missed = [i for i in right if scored[i].mismatch > self.g.alpha_end]
        chosen = []
        if kind == "self" and alpha < 1:
            shortest = sorted(right, key=lambda i: scored[i].episode.length)[: self.g.hindsight]
            chosen = [i for i in shortest if i in missed]
        elif kind == "user" and any(scored[i].episode.length <= scored[i].episode.budget for i in right):
            chosen = missed[: self.g.user_hindsight]
        for i in chosen:
            budget = needed(scored[i].episode.length, self.g.alpha_end, self.g.centre if kind == "self" else 1.0)
            episode = retold(self.policy, scored[i].episode, budget)
            scored[i] = replace(self._score(scored[i].question, episode, True, alpha, kind), retold=True)

    def _warning(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The figures that the alarms go by; one that nothing was there to measure for is left out."""
        own = [s for s in scored if s.kind == "self"]
        groups = [scored[start : start + self.g.group] for start in range(0, len(scored), self.g.group)]
        values = {
            "zero_spread": [spread([s.reward.total for s in group]) == 0 for group in groups],
            "outside": [s.episode.parsed.budget is not None and not s.episode.parsed.ok and s.episode.ended for s in own],
            "free_budget": [s.episode.budget for s in own if s.episode.budget and math.isinf(self.b_max[s.question.id])],
            "wrong_length": [s.episode.length for s in own if s.episode.budget and s.episode.ended and not s.correct],
        }
        return {name: sum(found) / len(found) for name, found in values.items() if found}

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


def finish(budget: int | None, correct: bool) -> Reward:
    """The reward of an answer that may have been cut: 1 for a right one, 0 for a wrong one, r_f when malformed."""
    if budget is None:
        return score(budget=None, length=0, correct=False, b_max=math.inf, alpha=1.0)
    return Reward(float(correct), 0.0, 0.0, float(correct), True)


def trained(scored: Scored) -> list[int]:
    """TRL's env_mask, 1 for each completion token that is trained on: not the injected ones, and of an answer that was cut only
    what follows them, for nothing before the cut could know of it."""
    injected = scored.episode.injected
    if True not in injected:
        return [1] * len(injected)
    last = len(injected) - 1 - injected[::-1].index(True)
    return [int(i > last) for i in range(len(injected))]


def summary(scored: Sequence[Scored], alpha: float, seconds: float) -> dict[str, float]:
    """The figures of a step, self-set answers only for those about the number; retelling comes after."""
    own = [s for s in scored if s.kind == "self"] or list(scored)
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
        "user_within_50": mean([s.mismatch <= 0.5 for s in scored if s.kind == "user"]),
        "cut_accuracy": mean([s.correct for s in scored if s.kind == "cut"]),
        "generate_seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }
