"""The rollouts of budget-guided GRPO: `Rollouts.__call__` is one step of the algorithm (paper section 4).

The reward is the paper's (section 3) unless another is given. `relabel` answers its dead zone.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from sbtiny import distributed
from sbtiny.budget.reward import Reward, scheduled_alpha
from sbtiny.config import GrpoSettings, Settings
from sbtiny.grpo.group_reward import GroupReward, RewardInput, make_selfbudgeter_reward
from sbtiny.grpo.groups import SELF_GROUP, Group, GroupType, draw_group_types, make_group, reward_range, split_groups
from sbtiny.grpo.relabel import best_budget, choose_missed, relabel_budget
from sbtiny.grpo.step_metrics import ScoredEpisode, alarm_metrics, step_metrics
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.runs import append_jsonl
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier

Row = tuple[Question, Group]  # what one answer is sampled for; the answers of a group are rows side by side


def alpha_at_step(step: int, g: GrpoSettings) -> float:
    """Alpha follows its schedule over the first (1 - alpha_hold) of the planned steps, then stays at alpha_end."""
    falling = max(1, round(g.steps * (1 - g.alpha_hold)))
    return scheduled_alpha(step, falling, g.alpha_start, g.alpha_end, g.alpha_schedule)


def sample_b_max(policy: Policy, questions: Sequence[Question], verify: Verifier, settings: Settings) -> dict[str, float]:
    """b_max by question id: tokens of the initial model's own answer, infinity if that was wrong (paper section 3).

    The initial model is the policy without its adapter.
    """
    room, seed = settings.grpo.max_tokens, settings.seed * 7_919
    requests = distributed.shard([policy.request(q.question, room, seed + i, system=q.system) for i, q in enumerate(questions)])
    with policy.model.disable_adapter():
        policy.refresh()
        with bar("lengths of the initial model", len(requests)) as advance:
            episodes = policy.sample(requests, Sampling(settings.data.temperature), lambda *_: advance())
    policy.refresh()
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
        self.wrap_up, self.reserve = tuple(policy.encode(settings.grpo.wrap_up)), settings.grpo.reserve
        self.metrics: dict[str, float] = {}
        self.shortest: dict[str, float] = {}

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Sample and score one step. `prompts`: this process's question ids, each repeated once per answer of its group."""
        step, started = trainer.state.global_step, time.perf_counter()
        alpha, rng = alpha_at_step(step, self.g), random.Random(f"{self.seed}/{step}")
        self.policy.refresh()
        questions = self._gather_questions(prompts)
        kinds = draw_group_types(len(questions), self.g, rng)
        groups = self.assign_budgets(questions, kinds, rng)
        rows = self._shard_rows(questions, groups)
        episodes = self.sample(rows, self._draw_seeds(step, len(rows)))
        correct = self.verify_answers(rows, episodes)
        scored = self.reward_answers(rows, episodes, correct, alpha)
        if self.g.resample_zero_std:
            scored = self.resample_equal_rewards(scored, questions, step, alpha)
        self._record_step(scored, step, alpha, started)
        scored = [s for group in split_groups(scored, self.g.num_generations) for s in self.relabel(group, alpha)]
        return to_trl(scored)

    def assign_budgets(self, questions: Sequence[Question], kinds: Sequence[GroupType], rng: random.Random) -> list[Group]:
        """The group of each question. A given budget lies around the one that the model states, so that is sampled first."""
        pairs = list(zip(questions, kinds, strict=True))
        stated = iter(self._sample_stated_budgets([q for q, kind in pairs if kind != "self"], rng.getrandbits(63)))
        return [make_group(kind, None if kind == "self" else next(stated), self.finite_b_max(q), self.g, rng) for q, kind in pairs]

    def sample(self, rows: Sequence[Row], seeds: Iterable[int]) -> list[Episode]:
        """One answer for each row, with the seed of the same place."""
        requests = [self.request(question, group, seed) for (question, group), seed in zip(rows, seeds, strict=False)]
        return self.policy.sample(requests, Sampling(temperature=self.g.temperature)) if requests else []

    def verify_answers(self, rows: Sequence[Row], episodes: Sequence[Episode]) -> list[bool]:
        """Whether each answer ended and is right; updates `shortest`."""
        correct = [e.ended and self.verify(e.solution, question) for (question, _), e in zip(rows, episodes, strict=True)]
        self._track_shortest((question, e.length) for (question, _), e, right in zip(rows, episodes, correct, strict=True) if right)
        return correct

    def reward_answers(
        self, rows: Sequence[Row], episodes: Sequence[Episode], correct: Sequence[bool], alpha: float
    ) -> list[ScoredEpisode]:
        """Reward the answers group by group, `grpo.num_generations` each."""
        scored = []
        for part in split_groups(list(zip(rows, episodes, correct, strict=True)), self.g.num_generations):
            (question, group), *_ = part[0]
            rewards = self._reward_group(question, group.kind, [e for _, e, _ in part], [right for *_, right in part], alpha)
            scored += [ScoredEpisode(e, question, group.kind, right, r) for (_, e, right), r in zip(part, rewards, strict=True)]
        return scored

    def score_episodes(self, rows: Sequence[Row], episodes: Sequence[Episode], alpha: float) -> list[ScoredEpisode]:
        """Verify and reward."""
        return self.reward_answers(rows, episodes, self.verify_answers(rows, episodes), alpha)

    def resample_equal_rewards(
        self, scored: Sequence[ScoredEpisode], questions: Sequence[Question], step: int, alpha: float
    ) -> list[ScoredEpisode]:
        """Replace each group of equal rewards, once, by a self-budget group of a question outside this step, while there are any."""
        rank = "" if distributed.is_main_process() else f"/{distributed.rank()}"
        rng = random.Random(f"{self.seed}/{step}/again{rank}")
        groups = split_groups(scored, self.g.num_generations)
        equal = [i for i, group in enumerate(groups) if reward_range([s.reward.total for s in group]) == 0]
        asked = {q.id for q in questions}
        others = [q for q in self.questions.values() if q.id not in asked]
        fresh = rng.sample(others, min(len(equal), len(others)))
        rows = [(question, SELF_GROUP) for question in fresh for _ in range(self.g.num_generations)]
        episodes = self.sample(rows, [rng.getrandbits(63) for _ in rows])
        rescored = split_groups(self.score_episodes(rows, episodes, alpha), self.g.num_generations)
        for i, group in zip(equal, rescored, strict=False):
            groups[i] = group
        return [s for group in groups for s in group]

    def relabel(self, group: list[ScoredEpisode], alpha: float) -> list[ScoredEpisode]:
        """Relabel the answers that `choose_missed` picks with their best budget, then reward the whole group again."""
        chosen = choose_missed(group, alpha, self.g)
        if not chosen:
            return group
        first, episodes = group[0], [s.episode for s in group]
        for i in chosen:
            budget = best_budget(episodes[i].length, self.g.alpha_end, self.g.reward_peak if first.kind == "self" else 1.0)
            episodes[i] = relabel_budget(self.policy, episodes[i], budget)
        rewards = self._reward_group(first.question, first.kind, episodes, [s.correct for s in group], alpha)
        relabelled = zip(group, episodes, rewards, strict=True)
        return [replace(s, episode=e, reward=reward, relabelled=i in chosen) for i, (s, e, reward) in enumerate(relabelled)]

    def reward(self, completions: list[str], reward: list[float], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
        """TRL's reward function: returns the rewards of the rollout and logs the metrics of the step."""
        for name, value in self.metrics.items():
            log_metric(name, value)
        return reward

    def request(self, question: Question, group: Group, seed: int) -> Request:
        limits = None if group.ceiling is None else Limits(group.ceiling, None, self.wrap_up, self.reserve)
        expected = group.ceiling or group.budget or int(self.finite_b_max(question))
        return self.policy.request(question.question, self.g.max_tokens, seed, group.budget, expected, limits, system=question.system)

    def finite_b_max(self, question: Question) -> float:
        value = self.b_max[question.id]
        return value if math.isfinite(value) else self.g.max_tokens

    def _gather_questions(self, prompts: list[str]) -> list[Question]:
        """The questions of the whole step, one a group, from the prompts of all processes."""
        return [self.questions[name] for name in distributed.gather(prompts)[:: self.g.num_generations]]

    def _shard_rows(self, questions: Sequence[Question], groups: Sequence[Group]) -> Sequence[Row]:
        """This process's part of the step's rows."""
        return distributed.shard([row for row in zip(questions, groups, strict=True) for _ in range(self.g.num_generations)])

    def _draw_seeds(self, step: int, rows: int) -> range:
        """A seed for each of this process's rows. It follows from the place in the whole step, whatever the number of processes."""
        first = random.Random(f"{self.seed}/{step}/seeds").getrandbits(63) + distributed.rank() * rows
        return range(first, first + rows)

    def _sample_stated_budgets(self, questions: Sequence[Question], seed: int) -> list[int | None]:
        """The budget that the model states for each question, None for none. Only the tag is sampled."""
        requests = [self.policy.budget_request(q.question, seed - 1 - i, q.system) for i, q in enumerate(questions)]
        return [e.parsed.budget for e in self.policy.sample(requests, Sampling(self.g.temperature))] if requests else []

    def _track_shortest(self, correct: Iterable[tuple[Question, int]]) -> None:
        for question, length in correct:
            self.shortest[question.id] = min(self.shortest.get(question.id, math.inf), length)

    def _reward_group(
        self, question: Question, kind: GroupType, group: Sequence[Episode], correct: Sequence[bool], alpha: float
    ) -> list[Reward]:
        """The rewards of a group's answers; one that did not end counts as malformed."""
        answers = [RewardInput(e.budget if e.ended else None, e.length, right) for e, right in zip(group, correct, strict=True)]
        return self.group_reward(kind, answers, self._reward_b_max(question, alpha), alpha)

    def _reward_b_max(self, question: Question, alpha: float) -> float:
        """b_max of a stated budget. With `b_max_from_best` at most 1 + alpha times the shortest correct answer seen."""
        b_max = self.b_max[question.id]
        if math.isinf(b_max):
            b_max = self.g.b_max_if_failed or math.inf
        return min(b_max, (1 + alpha) * self.shortest.get(question.id, math.inf)) if self.g.b_max_from_best else b_max

    def _record_step(self, scored: list[ScoredEpisode], step: int, alpha: float, started: float) -> None:
        """Gather the answers of all processes; update `shortest` and `metrics`; save a sample of each group every `sample_steps`."""
        gathered = distributed.gather(scored)
        self._track_shortest((s.question, s.episode.length) for s in gathered if s.correct)
        self.metrics = step_metrics(gathered, alpha, time.perf_counter() - started)
        self.metrics |= alarm_metrics(gathered, self.g.num_generations, self.b_max)
        if step % self.g.sample_steps == 0 and distributed.is_main_process():
            self._save_samples(step, gathered)

    def _save_samples(self, step: int, scored: Sequence[ScoredEpisode]) -> None:
        for s in scored[:: self.g.num_generations]:
            row = {"step": step, "question": s.question.question, "text": s.episode.text, "budget": s.episode.budget}
            row |= {"length": s.episode.length, "correct": s.correct, "reward": s.reward.total}
            append_jsonl(self.output / "samples.jsonl", row)


def to_trl(scored: Sequence[ScoredEpisode]) -> dict[str, Any]:
    """What TRL's trainer takes from a rollout: token ids, the loss mask (`env_mask`) and the rewards."""
    return {
        "prompt_ids": [list(s.episode.request.prompt_ids) for s in scored],
        "completion_ids": [s.episode.completion_ids for s in scored],
        "logprobs": None,
        "env_mask": [loss_mask(s) for s in scored],
        "reward": [s.reward.total for s in scored],
    }


def loss_mask(scored: ScoredEpisode) -> list[int]:
    """1 for each completion token that is trained on, 0 for injected ones.

    Of an answer that was cut only the tokens after the wrap-up are trained: none before could know of the cut.
    """
    injected = scored.episode.injected
    if True not in injected:
        return [1] * len(injected)
    last = len(injected) - 1 - injected[::-1].index(True)
    return [int(i > last) for i in range(len(injected))]
