"""The rollouts of budget-guided GRPO: `Rollouts.__call__` is one step of the algorithm (paper section 4).

The reward is the paper's (section 3) unless another is given. `relabel` answers its dead zone.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from sbtiny import distributed
from sbtiny.budget.reward import scheduled_alpha
from sbtiny.config import GrpoSettings, Settings
from sbtiny.grpo.group_reward import GroupReward, RewardInput, make_selfbudgeter_reward
from sbtiny.grpo.groups import SELF_GROUP, Group, GroupAnswer, GroupType, are_rewards_equal, draw_group_types, make_group, step_metrics
from sbtiny.grpo.relabel import best_budget, choose_missed, relabel_budget
from sbtiny.progress import bar
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.policy import Policy
from sbtiny.runs import append_jsonl
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier


def alpha_at_step(step: int, g: GrpoSettings) -> float:
    """Alpha follows its schedule over the first (1 - alpha_hold) of the planned steps, then stays at alpha_end."""
    falling = max(1, round(g.steps * (1 - g.alpha_hold)))
    return scheduled_alpha(step, falling, g.alpha_start, g.alpha_end, g.alpha_schedule)


def sample_b_max(policy: Policy, questions: Sequence[Question], verify: Verifier, settings: Settings) -> dict[str, float]:
    """b_max by question id: tokens of the initial model's own answer, infinity if that was wrong (paper section 3).

    The initial model is the policy without its adapter.
    """
    room, seed = settings.grpo.max_tokens, settings.seed * 7_919
    with policy.initial_model():
        requests = distributed.shard([policy.request(q.question, room, seed + i, system=q.system) for i, q in enumerate(questions)])
        with bar("lengths of the initial model", len(requests)) as advance:
            episodes = policy.sample(requests, Sampling(settings.data.temperature), lambda *_: advance())
    pairs = zip(distributed.shard(questions), episodes, strict=True)
    return dict(distributed.gather([(q.id, float(e.length) if e.ended and verify(e.solution, q) else math.inf) for q, e in pairs]))


class Rollouts:
    """TRL's `rollout_func`. `metrics` are those of the last step, `shortest` the tokens of the shortest correct answer by question id."""

    def __init__(
        self,
        policy: Policy,
        questions: Sequence[Question],
        verify: Verifier,
        b_max: dict[str, float],
        settings: Settings,
        output: Path,
        reward: GroupReward | None = None,
    ) -> None:
        self.policy, self.verify, self.b_max, self.output = policy, verify, b_max, output
        self.group_reward = reward or make_selfbudgeter_reward(settings.grpo)
        self.questions = {q.id: q for q in questions}
        self.g, self.seed = settings.grpo, settings.seed
        if self.g.cut_share:
            self.limits(1)  # raises before anything is sampled
        self.metrics: dict[str, float] = {}
        self.shortest: dict[str, float] = {}

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Sample and score one step. `prompts`: this process's question ids, each repeated once per answer of its group."""
        step, started = trainer.state.global_step, time.perf_counter()
        alpha, rng = alpha_at_step(step, self.g), random.Random(f"{self.seed}/{step}")
        self.policy.refresh()
        questions = [self.questions[name] for name in distributed.gather(prompts)[:: self.g.num_generations]]
        kinds = draw_group_types(len(questions), self.g, rng)
        assigned = list(zip(questions, self.assign_budgets(questions, kinds, rng), strict=True))
        groups = self.sample(distributed.shard(assigned), self._draw_seeds(step, len(prompts)))
        self.score_answers(groups, alpha)
        if self.g.resample_zero_std:
            self.resample_equal_rewards(groups, questions, step, alpha)
        self._record_step(groups, step, alpha, started)
        for group in groups:
            self.relabel(group, alpha)
        return to_trl([answer for group in groups for answer in group])

    def assign_budgets(self, questions: Sequence[Question], kinds: Sequence[GroupType], rng: random.Random) -> list[Group]:
        """The group of each question. A given budget lies around the one that the model states, so that is sampled first."""
        pairs = list(zip(questions, kinds, strict=True))
        stated = iter(self._sample_stated_budgets([q for q, kind in pairs if kind != "self"], rng.getrandbits(63)))
        return [make_group(kind, None if kind == "self" else next(stated), self.finite_b_max(q), self.g, rng) for q, kind in pairs]

    def sample(self, assigned: Sequence[tuple[Question, Group]], seeds: Iterable[int]) -> list[list[GroupAnswer]]:
        """Sample `grpo.num_generations` answers for each question and its group, each with a seed of its own."""
        size = self.g.num_generations
        rows = [pair for pair in assigned for _ in range(size)]
        requests = [self.request(question, group, seed) for (question, group), seed in zip(rows, seeds, strict=False)]
        episodes = self.policy.sample(requests, Sampling(temperature=self.g.temperature))
        answers = [GroupAnswer(question, group, episode) for (question, group), episode in zip(rows, episodes, strict=True)]
        return [answers[start : start + size] for start in range(0, len(answers), size)]

    def score_answers(self, groups: Sequence[Sequence[GroupAnswer]], alpha: float) -> None:
        """Say which answers ended and are right, update `shortest`, and reward them."""
        for answer in (answer for group in groups for answer in group):
            answer.correct = answer.episode.ended and self.verify(answer.episode.solution, answer.question)
        self._track_shortest(groups)
        self.reward_answers(groups, alpha)

    def reward_answers(self, groups: Sequence[Sequence[GroupAnswer]], alpha: float) -> None:
        """Reward the answers group by group; one that did not end counts as malformed."""
        for group in groups:
            inputs = [RewardInput(a.episode.budget if a.episode.ended else None, a.episode.length, a.correct) for a in group]
            rewards = self.group_reward(group[0].group.kind, inputs, self._reward_b_max(group[0].question, alpha), alpha)
            for answer, reward in zip(group, rewards, strict=True):
                answer.reward = reward

    def resample_equal_rewards(self, groups: list[list[GroupAnswer]], questions: Sequence[Question], step: int, alpha: float) -> None:
        """Replace each group of equal rewards, once, by a self-budget group of a question outside this step, while there are any."""
        rank = "" if distributed.is_main_process() else f"/{distributed.rank()}"
        rng = random.Random(f"{self.seed}/{step}/again{rank}")
        equal = [i for i, group in enumerate(groups) if are_rewards_equal(group)]
        asked = {q.id for q in questions}
        others = [q for q in self.questions.values() if q.id not in asked]
        fresh = rng.sample(others, min(len(equal), len(others)))
        seeds = [rng.getrandbits(63) for _ in range(len(fresh) * self.g.num_generations)]
        resampled = self.sample([(question, SELF_GROUP) for question in fresh], seeds)
        self.score_answers(resampled, alpha)
        for i, group in zip(equal, resampled, strict=False):
            groups[i] = group

    def relabel(self, group: Sequence[GroupAnswer], alpha: float) -> None:
        """Relabel the answers that `choose_missed` picks with their best budget, then reward the whole group again."""
        centre = self.g.reward_peak if group[0].group.kind == "self" else 1.0
        chosen = choose_missed(group, alpha, self.g)
        for answer in chosen:
            budget = best_budget(answer.episode.length, self.g.alpha_end, centre)
            answer.episode, answer.relabelled = relabel_budget(self.policy, answer.episode, budget), True
        if chosen:
            self.reward_answers([group], alpha)

    def reward(self, completions: list[str], reward: list[float], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
        """TRL's reward function: returns the rewards of the rollout and logs the metrics of the step."""
        for name, value in self.metrics.items():
            log_metric(name, value)
        return reward

    def limits(self, ceiling: int) -> Limits:
        return self.policy.cut_limits(ceiling, self.g.wrap_up, self.g.reserve)

    def request(self, question: Question, group: Group, seed: int) -> Request:
        limits = None if group.ceiling is None else self.limits(group.ceiling)
        expected = group.ceiling or group.budget or int(self.finite_b_max(question))
        return self.policy.request(question.question, self.g.max_tokens, seed, group.budget, expected, limits, system=question.system)

    def finite_b_max(self, question: Question) -> float:
        value = self.b_max[question.id]
        return value if math.isfinite(value) else self.g.max_tokens

    def _draw_seeds(self, step: int, rows: int) -> range:
        """A seed for each of this process's rows. It follows from the place in the whole step, whatever the number of processes."""
        first = random.Random(f"{self.seed}/{step}/seeds").getrandbits(63) + distributed.rank() * rows
        return range(first, first + rows)

    def _sample_stated_budgets(self, questions: Sequence[Question], seed: int) -> list[int | None]:
        """The budget that the model states for each question, None for none. Only the tag is sampled."""
        requests = [self.policy.budget_request(q.question, seed - 1 - i, q.system) for i, q in enumerate(questions)]
        return [e.parsed.budget for e in self.policy.sample(requests, Sampling(self.g.temperature))]

    def _track_shortest(self, groups: Sequence[Sequence[GroupAnswer]]) -> None:
        for answer in (answer for group in groups for answer in group if answer.correct):
            name = answer.question.id
            self.shortest[name] = min(self.shortest.get(name, math.inf), answer.episode.length)

    def _reward_b_max(self, question: Question, alpha: float) -> float:
        """b_max of a stated budget. With `b_max_from_best` at most 1 + alpha times the shortest correct answer seen."""
        b_max = self.b_max[question.id]
        if math.isinf(b_max):
            b_max = self.g.b_max_if_failed or math.inf
        return min(b_max, (1 + alpha) * self.shortest.get(question.id, math.inf)) if self.g.b_max_from_best else b_max

    def _record_step(self, groups: list[list[GroupAnswer]], step: int, alpha: float, started: float) -> None:
        """Gather the answers of all processes; update `shortest` and `metrics`; save a sample of each group every `sample_steps`."""
        gathered = distributed.gather(groups)
        self._track_shortest(gathered)
        self.metrics = step_metrics(gathered, self.b_max, alpha, time.perf_counter() - started)
        if step % self.g.sample_steps == 0 and distributed.is_main_process():
            for first, *_ in gathered:
                row = {"step": step, "question": first.question.question, "text": first.episode.text, "budget": first.episode.budget}
                row |= {"length": first.episode.length, "correct": first.correct, "reward": first.reward.total}
                append_jsonl(self.output / "samples.jsonl", row)


def to_trl(answers: Sequence[GroupAnswer]) -> dict[str, Any]:
    """What TRL's trainer takes from a rollout: token ids, the loss mask (`env_mask`) and the rewards."""
    return {
        "prompt_ids": [list(a.episode.request.prompt_ids) for a in answers],
        "completion_ids": [a.episode.completion_ids for a in answers],
        "logprobs": None,
        "env_mask": [mask_through_last_injected(a.episode.injected) for a in answers],
        "reward": [a.reward.total for a in answers],
    }


def mask_through_last_injected(injected: Sequence[bool]) -> list[int]:
    """1 for each completion token that is trained on: of an answer that was cut only those after the wrap-up.

    None before could know of the cut.
    """
    last = max((i for i, was in enumerate(injected) if was), default=-1)
    return [int(i > last) for i in range(len(injected))]
