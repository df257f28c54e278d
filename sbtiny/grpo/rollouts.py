"""The rollouts of budget-guided GRPO: which requests a step makes, what each answer earns, and which answers are retold.

The reward is the paper's (section 3) unless another is given; its dead zone is answered in `hindsight`.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from sbtiny.budget.reward import Reward, alpha_after
from sbtiny.config import GrpoSettings, Settings
from sbtiny.progress import bar
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.runs import append_jsonl
from sbtiny.tasks.sources import Question
from sbtiny import distributed
from sbtiny.grpo.step_metrics import Scored, summary, warning
from sbtiny.grpo.groups import SELF, Group, Kind, deal, kinds, spread
from sbtiny.grpo.relabel import needed, retold
from sbtiny.grpo.group_reward import Answer, GroupReward, selfbudgeter

Verify = Callable[[str, Question], bool]


def alpha_at(step: int, g: GrpoSettings) -> float:
    """The schedule over the first (1 - alpha_hold) of the planned steps, then alpha_end."""
    falling = max(1, round(g.steps * (1 - g.alpha_hold)))
    return alpha_after(step, falling, g.alpha_start, g.alpha_end, g.alpha_schedule)


def initial_lengths(
    policy: Policy, questions: Sequence[Question], verify: Verify, settings: Settings
) -> dict[str, float]:
    """b_max of each question id: the length of the initial model's own answer, infinity when that was wrong (paper section 3).

    The initial model is the policy without its adapter.
    """
    room, seed = settings.grpo.max_tokens, settings.seed * 7_919
    requests = distributed.mine([policy.request(q.question, room, seed + i, system=q.system) for i, q in enumerate(questions)])
    with policy.model.disable_adapter():
        policy.refresh()
        with bar("lengths of the initial model", len(requests)) as advance:
            episodes = policy.sample(requests, Sampling(settings.data.temperature), lambda *_: advance())
    policy.refresh()
    pairs = zip(distributed.mine(questions), episodes, strict=True)
    return dict(distributed.gather([(q.id, float(e.length) if e.ended and verify(e.solution, q) else math.inf) for q, e in pairs]))


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
        reward: GroupReward | None = None,
    ) -> None:
        self.policy, self.verify, self.b_max, self.output = policy, verify, b_max, output
        self.group_reward = reward or selfbudgeter(settings.grpo)
        self.questions = {q.id: q for q in questions}
        self.g, self.seed = settings.grpo, settings.seed
        self.wrap_up, self.reserve = tuple(policy.encode(settings.grpo.wrap_up)), settings.grpo.reserve
        self.metrics: dict[str, float] = {}
        self.shortest: dict[str, float] = {}  # correct answers seen, in tokens, by question id

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """`prompts` are question ids, each already repeated once per answer of its group: those of this process, of several.

        What a group is asked, and every seed, follow from its place in the whole step, so that any number of processes samples the same.
        """
        step, started = trainer.state.global_step, time.perf_counter()
        self.policy.refresh()
        alpha = alpha_at(step, self.g)
        asked = [self.questions[name] for name in distributed.gather(prompts)[:: self.g.group]]
        groups = self._groups(asked, step)
        first = random.Random(f"{self.seed}/{step}/seeds").getrandbits(63)
        rows = distributed.mine([(q, group) for q, group in zip(asked, groups, strict=True) for _ in range(self.g.group)])
        first += distributed.rank() * len(rows)
        requests = [self._request(q, group, first + i) for i, (q, group) in enumerate(rows)]
        episodes = self.policy.sample(requests, Sampling(temperature=self.g.temperature))
        scored = self.judge([(q, group.kind) for q, group in rows], episodes, alpha)
        if self.g.replace_flat:
            self._replace_flat(scored, asked, step, alpha)
        everything = distributed.gather(scored)
        for s in everything:  # those of the other processes
            if s.correct:
                self._note(s.question, s.episode)
        self.metrics = summary(everything, alpha, time.perf_counter() - started) | warning(everything, self.g.group, self.b_max)
        if step % self.g.sample_steps == 0 and distributed.first():
            self._keep(step, everything)
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
        led = [q for q, kind in zip(asked, dealt, strict=True) if kind != "self"]
        said = iter(self._own_budgets(led, rng.getrandbits(63)))
        return [
            deal(kind, None if kind == "self" else next(said), self.b_max_of(q), self.g, rng)
            for q, kind in zip(asked, dealt, strict=True)
        ]

    def _request(self, question: Question, group: Group, seed: int) -> Request:
        limits = None if group.ceiling is None else Limits(group.ceiling, None, self.wrap_up, self.reserve)
        expected = group.ceiling or group.budget or int(self.b_max_of(question))
        return self.policy.request(question.question, self.g.max_tokens, seed, group.budget, expected, limits, system=question.system)

    def b_max_of(self, question: Question) -> float:
        value = self.b_max[question.id]
        return value if math.isfinite(value) else self.g.max_tokens

    def _own_budgets(self, questions: Sequence[Question], seed: int) -> list[int | None]:
        """The number the model would say to each question: only the tag is sampled."""
        requests = [self.policy.budget_request(q.question, seed - 1 - i, q.system) for i, q in enumerate(questions)]
        return [e.parsed.budget for e in self.policy.sample(requests, Sampling(self.g.temperature))] if requests else []

    def judge(self, asked: Sequence[tuple[Question, Kind]], episodes: Sequence[Episode], alpha: float) -> list[Scored]:
        """Verifies all, notes the shortest correct answers, then rewards group by group, `grpo.group` answers each."""
        correct = [e.ended and self.verify(e.solution, q) for (q, _), e in zip(asked, episodes, strict=True)]
        for (question, _), episode, right in zip(asked, episodes, correct, strict=True):
            if right:
                self._note(question, episode)
        rewards: list[Reward] = []
        for start in range(0, len(episodes), self.g.group):
            part = slice(start, start + self.g.group)
            rewards += self._earned(*asked[start], episodes[part], correct[part], alpha)
        judged = zip(asked, episodes, correct, rewards, strict=True)
        return [Scored(episode, question, kind, right, reward) for (question, kind), episode, right, reward in judged]

    def _note(self, question: Question, right: Episode) -> None:
        self.shortest[question.id] = min(self.shortest.get(question.id, math.inf), right.length)

    def _earned(
        self, question: Question, kind: Kind, group: Sequence[Episode], correct: Sequence[bool], alpha: float
    ) -> list[Reward]:
        """What the answers of a group earn; one that did not end counts as malformed."""
        answers = [Answer(e.budget if e.ended else None, e.length, right) for e, right in zip(group, correct, strict=True)]
        return self.group_reward(kind, answers, self._bound(question, alpha), alpha)

    def _bound(self, question: Question, alpha: float) -> float:
        """b_max of a self-set budget. Tight: no more than alpha above the shortest correct answer seen, for that is enough."""
        b_max = self.b_max[question.id]
        if math.isinf(b_max):
            b_max = self.g.failed_bmax or math.inf
        return min(b_max, (1 + alpha) * self.shortest.get(question.id, math.inf)) if self.g.tight_bmax else b_max

    def _replace_flat(self, scored: list[Scored], asked: Sequence[Question], step: int, alpha: float) -> None:
        """Sample each group of equal rewards again, once, with a self-set question that the step does not ask, where there is one."""
        rng, size = random.Random(f"{self.seed}/{step}/again" + f"/{distributed.rank()}" * (not distributed.first())), self.g.group
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

        Self-set: the shortest, because their length is what the question takes; the longest would teach the number of a waste. With the
        paper's peak, on the window's far edge, only once alpha is below 1: before that there is no edge. A user's: any, so that all
        lengths are met; but none where the number is below every answer, for beside a retold one the nearest to it would look bad.
        """
        kind = scored[group.start].kind
        right = [i for i in group if scored[i].correct and scored[i].episode.budget]
        missed = [i for i in right if scored[i].mismatch > self.g.alpha_end]
        chosen = []
        if kind == "self" and (alpha < 1 or self.g.centre == 1):
            shortest = sorted(right, key=lambda i: scored[i].episode.length)[: self.g.hindsight]
            chosen = [i for i in shortest if i in missed]
        elif kind == "user" and any(scored[i].episode.length <= scored[i].episode.budget for i in right):
            chosen = missed[: self.g.user_hindsight]
        for i in chosen:
            budget = needed(scored[i].episode.length, self.g.alpha_end, self.g.centre if kind == "self" else 1.0)
            scored[i] = replace(scored[i], episode=retold(self.policy, scored[i].episode, budget), retold=True)
        if chosen:
            told = [scored[i] for i in group]
            rewards = self._earned(told[0].question, kind, [s.episode for s in told], [s.correct for s in told], alpha)
            for s, reward in zip(told, rewards, strict=True):
                s.reward = reward

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


def trained(scored: Scored) -> list[int]:
    """TRL's env_mask, 1 for each completion token that is trained on: not the injected ones, and of an answer that was cut only
    what follows them, for nothing before the cut could know of it."""
    injected = scored.episode.injected
    if True not in injected:
        return [1] * len(injected)
    last = len(injected) - 1 - injected[::-1].index(True)
    return [int(i > last) for i in range(len(injected))]
