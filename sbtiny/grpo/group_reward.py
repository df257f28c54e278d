"""The rewards of a group's answers. Pure: a reward is a plain function of a group, and another can replace it.

It takes a group, because some rewards compare the answers to one question (`examples/rival_rewards.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from sbtiny.budget.reward import Reward, RewardConfig, compute_reward
from sbtiny.config import GrpoSettings
from sbtiny.grpo.groups import GroupType

USER_ALPHA = 0.5  # largest alpha for given budgets
# A given budget cannot move to the length. So a long slope draws the length to it from anywhere, and b_max costs nothing.
USER_REWARD = RewardConfig(r_b=0.0, outside_slope=0.5, reward_peak=1.0)


@dataclass(frozen=True, slots=True)
class RewardInput:
    """All that a reward may look at; `budget` is the stated or given one, None for a malformed answer; `length` in tokens."""

    budget: int | None
    length: int
    correct: bool


# (kind of the group, its answers, b_max of the question, alpha) -> the reward of each answer
GroupReward = Callable[[GroupType, Sequence[RewardInput], float, float], list[Reward]]


def make_selfbudgeter_reward(g: GrpoSettings) -> GroupReward:
    """The paper's reward (section 3), with the slope and peak of the settings.

    A given budget is not compared with b_max, and its window is narrow from the start. In a cut group only being right earns: the
    model did not choose the length.
    """
    paper = RewardConfig(outside_slope=g.outside_slope, reward_peak=g.reward_peak)

    def reward_one(kind: GroupType, answer: RewardInput, b_max: float, alpha: float) -> Reward:
        if kind == "cut":
            return cut_reward(answer.budget, answer.correct)
        config = paper
        if kind == "user":
            b_max, alpha, config = math.inf, min(alpha, USER_ALPHA), USER_REWARD
        return compute_reward(**asdict(answer), b_max=b_max, alpha=alpha, config=config)

    return lambda kind, answers, b_max, alpha: [reward_one(kind, answer, b_max, alpha) for answer in answers]


def cut_reward(budget: int | None, correct: bool) -> Reward:
    """The reward in a cut group: 1 if right, 0 if wrong, r_f if malformed."""
    return scalar_reward(budget, float(correct))


def scalar_reward(budget: int | None, earned: float) -> Reward:
    """A reward without parts, whether or not the budget was kept; r_f if malformed."""
    if budget is None:
        return compute_reward(budget=None, length=0, correct=False, b_max=math.inf, alpha=1.0)
    return Reward(earned, 0.0, 0.0, earned, True)
