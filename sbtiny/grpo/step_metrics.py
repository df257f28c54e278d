"""Mean metrics of a GRPO step from its scored answers: for the log, and for the alarms. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sbtiny.budget.reward import Reward, relative_mismatch
from sbtiny.grpo.groups import GroupType, reward_range, split_groups
from sbtiny.rollout.episode import Episode
from sbtiny.tasks.sources import Question


@dataclass(slots=True)
class ScoredEpisode:
    """An episode with its question, the kind of its group, the verdict and the reward."""

    episode: Episode
    question: Question
    kind: GroupType
    correct: bool
    reward: Reward
    relabelled: bool = False

    @property
    def mismatch(self) -> float:
        """|l - b| / b, infinite when malformed."""
        budget = self.episode.budget
        return relative_mismatch(self.episode.length, budget) if budget else math.inf


def step_metrics(scored: Sequence[ScoredEpisode], alpha: float, seconds: float) -> dict[str, float]:
    """Mean metrics of one step, before relabelling. Names without a prefix cover self-budget groups only.

    A metric without samples is omitted.
    """
    own = [s for s in scored if s.kind == "self"]
    tokens = sum(len(s.episode.completion_ids) for s in scored)
    values = {
        "accuracy": [s.correct for s in own],
        "tokens": [s.episode.length for s in own],
        "budget": [s.episode.budget for s in own if s.episode.budget],
        "within_50": [s.mismatch <= 0.5 for s in own],
        "malformed": [s.episode.budget is None for s in own],
        "self_reward": [s.reward.total for s in own],
        "user_within_50": [s.mismatch <= 0.5 for s in scored if s.kind == "user"],
        "cut_accuracy": [s.correct for s in scored if s.kind == "cut"],
    }
    speed = {"generate_seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
    return {"alpha": alpha} | means(values) | speed


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each list that is not empty."""
    return {name: sum(samples) / len(samples) for name, samples in values.items() if samples}


def alarm_metrics(scored: Sequence[ScoredEpisode], group: int, b_max: Mapping[str, float]) -> dict[str, float]:
    """The metrics for the alarms, from `group` answers a question. A metric without samples is omitted."""
    own = [s for s in scored if s.kind == "self"]
    values: dict[str, Sequence[float]] = {
        "frac_reward_zero_std_sampled": [reward_range([s.reward.total for s in answers]) == 0 for answers in split_groups(scored, group)],
        "text_outside_tags": [s.episode.parsed.budget is not None and not s.episode.parsed.ok and s.episode.ended for s in own],
        "budget_if_failed": [s.episode.budget for s in own if s.episode.budget and math.isinf(b_max[s.question.id])],
        "length_if_wrong": [s.episode.length for s in own if s.episode.budget and s.episode.ended and not s.correct],
    }
    return means(values)
