"""The figures of a GRPO step, from its scored answers: those that are shown, and those that the alarms go by. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sbtiny.budget.reward import Reward, mismatch
from sbtiny.rollout.episode import Episode
from sbtiny.tasks.sources import Question
from sbtiny.grpo.groups import Kind, spread


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


def summary(scored: Sequence[Scored], alpha: float, seconds: float) -> dict[str, float]:
    """The figures of a step, of self-set answers unless their name says whose, before any is retold; one of answers that the step did not
    draw is left out."""
    own = [s for s in scored if s.kind == "self"]
    tokens = sum(len(s.episode.completion_ids) for s in scored)
    means = {
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
    return {"alpha": alpha} | drawn(means) | speed


def drawn(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each that has values."""
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def warning(scored: Sequence[Scored], group: int, b_max: Mapping[str, float]) -> dict[str, float]:
    """The figures that the alarms go by, of `group` answers a question; one that nothing was there to measure for is left out."""
    own = [s for s in scored if s.kind == "self"]
    groups = [scored[start : start + group] for start in range(0, len(scored), group)]
    values: dict[str, Sequence[float]] = {
        "zero_spread": [spread([s.reward.total for s in each]) == 0 for each in groups],
        "outside": [s.episode.parsed.budget is not None and not s.episode.parsed.ok and s.episode.ended for s in own],
        "free_budget": [s.episode.budget for s in own if s.episode.budget and math.isinf(b_max[s.question.id])],
        "wrong_length": [s.episode.length for s in own if s.episode.budget and s.episode.ended and not s.correct],
    }
    return drawn(values)
