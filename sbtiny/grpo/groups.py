"""The groups of a GRPO step, their answers and their metrics. Pure.

A group states its own budget, is given one, or is cut and must finish.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sbtiny.budget.reward import Reward, relative_mismatch
from sbtiny.config import GrpoSettings
from sbtiny.rollout.episode import Episode
from sbtiny.tasks.sources import Question

GroupType = Literal["self", "user", "cut"]
CUT_SHARE_RANGE = (0.2, 0.9)  # a cut group is stopped at a share between these of its stated budget, or of b_max where that is less


@dataclass(frozen=True, slots=True)
class Group:
    """`budget` is prefilled, None if the model states its own; the body is cut at `ceiling` tokens."""

    kind: GroupType
    budget: int | None = None
    ceiling: int | None = None


SELF_GROUP = Group("self")


@dataclass(slots=True)
class GroupAnswer:
    """One answer of a group; its verdict and its reward come after it."""

    question: Question
    group: Group
    episode: Episode
    correct: bool = False
    reward: Reward | None = None
    relabelled: bool = False

    @property
    def mismatch(self) -> float:
        """|l - b| / b, infinite when malformed."""
        budget = self.episode.budget
        return relative_mismatch(self.episode.length, budget) if budget else math.inf


def draw_group_types(count: int, g: GrpoSettings, rng: random.Random) -> list[GroupType]:
    """Draw the kinds of `count` groups by `user_share` and `cut_share`; the rest state their own budget."""
    return rng.choices(("user", "cut", "self"), (g.user_share, g.cut_share, 1 - g.user_share - g.cut_share), k=count)


def make_group(kind: GroupType, own: int | None, longest: float, g: GrpoSettings, rng: random.Random) -> Group:
    """A group of that kind. `own`: the stated budget, None for none; `longest`: b_max of the question in tokens.

    A given budget is drawn log-uniformly between multiples of the stated one. It is at most b_max or twice the stated budget,
    whichever is more: the model has nothing to fill a larger one with. Nor is it more than `grpo.max_tokens`, where an answer is cut.
    """
    if kind == "self" or own is None:
        return SELF_GROUP
    if kind == "cut":
        natural = min(own, longest)
        return Group("cut", own, max(1, int(natural * rng.uniform(*CUT_SHARE_RANGE))))
    low, high = g.user_low * own, min(g.user_high * own, max(longest, 2 * own), g.max_tokens)
    low = min(low, high)
    return Group("user", max(1, round(math.exp(rng.uniform(math.log(low), math.log(high))))))


def are_rewards_equal(answers: Sequence[GroupAnswer]) -> bool:
    """Whether a group has no advantage, and so nothing to learn from."""
    return len({answer.reward.total for answer in answers}) == 1


def step_metrics(groups: Sequence[Sequence[GroupAnswer]], b_max: Mapping[str, float], alpha: float, seconds: float) -> dict[str, float]:
    """Mean metrics of one step, before relabelling, for the log and the alarms. `b_max` by question id; `seconds` of generation.

    Names without a prefix cover self-budget groups only; alpha, the speed and frac_reward_zero_std_sampled cover all. A metric without
    samples is omitted.
    """
    answers = [a for group in groups for a in group]
    own = [a for a in answers if a.group.kind == "self"]
    formed = [a for a in own if a.episode.budget]
    samples = {
        "accuracy": [a.correct for a in own],
        "tokens": [a.episode.length for a in own],
        "budget": [a.episode.budget for a in formed],
        "budget_if_failed": [a.episode.budget for a in formed if math.isinf(b_max[a.question.id])],  # the initial model failed
        "within_50": [a.mismatch <= 0.5 for a in own],
        "malformed": [a.episode.budget is None for a in own],
        "text_outside_tags": [a.episode.parsed.budget is not None and not a.episode.parsed.ok and a.episode.ended for a in own],
        "length_if_wrong": [a.episode.length for a in formed if a.episode.ended and not a.correct],
        "self_reward": [a.reward.total for a in own],
        "user_within_50": [a.mismatch <= 0.5 for a in answers if a.group.kind == "user"],
        "cut_accuracy": [a.correct for a in answers if a.group.kind == "cut"],
        "frac_reward_zero_std_sampled": [are_rewards_equal(group) for group in groups],  # TRL's own is of relabelled answers
    }
    tokens = sum(len(a.episode.completion_ids) for a in answers)
    speed = {"generate_seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
    return {"alpha": alpha} | {name: sum(values) / len(values) for name, values in samples.items() if values} | speed
