"""What the answers of a group earn. Pure: a reward is a plain function of a group, so that another can take its place.

Groups, not answers, because some rewards compare the answers to one question with each other (`s/rival_rewards.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sbtiny.budget.reward import Reward, RewardConfig, score
from sbtiny.config import GrpoSettings
from sbtiny.grpo.groups import Kind

USER_ALPHA = 0.5  # width of the window for prefilled budgets while alpha is wider
# A prefilled number cannot move to the length, so the length must be drawn to it from anywhere: a long slope, no b_max to spare.
USER_REWARD = RewardConfig(r_b=0.0, slope=0.5, centre=1.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a reward may look at; `budget` is the number it was held to, the model's or a user's, None for a malformed answer."""

    budget: int | None
    length: int
    correct: bool


# (what was asked of the group, its answers, b_max of the question, alpha) -> what each answer earns
GroupReward = Callable[[Kind, Sequence[Answer], float, float], list[Reward]]


def selfbudgeter(g: GrpoSettings) -> GroupReward:
    """The paper's reward, with `slope` and `centre` of the settings.

    A budget the user set is not measured against b_max, and its window is narrow from the start. An answer that was cut earns by
    being right alone: how long it would have been was not its choice.
    """
    paper = RewardConfig(slope=g.slope, centre=g.centre)

    def one(kind: Kind, answer: Answer, b_max: float, alpha: float) -> Reward:
        if kind == "cut":
            return finish(answer.budget, answer.correct)
        config = paper
        if kind == "user":
            b_max, alpha, config = math.inf, min(alpha, USER_ALPHA), USER_REWARD
        told = {"budget": answer.budget, "length": answer.length, "correct": answer.correct}
        return score(**told, b_max=b_max, alpha=alpha, config=config)

    return lambda kind, answers, b_max, alpha: [one(kind, answer, b_max, alpha) for answer in answers]


def finish(budget: int | None, correct: bool) -> Reward:
    """The reward of an answer that may have been cut: 1 for a right one, 0 for a wrong one, r_f when malformed."""
    return plain(budget, float(correct))


def plain(budget: int | None, earned: float) -> Reward:
    """A reward that is one number, kept or not being no part of it; r_f when malformed."""
    if budget is None:
        return score(budget=None, length=0, correct=False, b_max=math.inf, alpha=1.0)
    return Reward(earned, 0.0, 0.0, earned, True)
