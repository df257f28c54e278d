"""The groups of a GRPO step: each states its own budget, is given one, or is cut and must finish. Pure."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from sbtiny.config import GrpoSettings

GroupType = Literal["self", "user", "cut"]
CUT_SHARE_RANGE = (0.2, 0.9)  # a cut group is stopped at a share of its stated budget between these
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """`budget` is prefilled, None if the model states its own; the body is cut at `ceiling` tokens."""

    kind: GroupType
    budget: int | None = None
    ceiling: int | None = None


SELF_GROUP = Group("self")


def draw_group_types(count: int, g: GrpoSettings, rng: random.Random) -> list[GroupType]:
    """Draw the kinds of `count` groups by `user_share` and `cut_share`; the rest state their own budget."""
    return rng.choices(("user", "cut", "self"), (g.user_share, g.cut_share, 1 - g.user_share - g.cut_share), k=count)


def make_group(kind: GroupType, own: int | None, longest: float, g: GrpoSettings, rng: random.Random) -> Group:
    """A group of that kind. `own`: the stated budget, None for none; `longest`: b_max of the question in tokens.

    A given budget is drawn log-uniformly between multiples of the stated one. It is at most b_max or twice the stated budget,
    whichever is more: the model has nothing to fill a larger one with.
    """
    if kind == "self" or own is None:
        return SELF_GROUP
    if kind == "cut":
        natural = min(own, longest)
        return Group("cut", own, max(1, int(natural * rng.uniform(*CUT_SHARE_RANGE))))
    low, high = g.user_low * own, min(g.user_high * own, max(longest, 2 * own))
    low = min(low, high)
    return Group("user", max(1, round(math.exp(rng.uniform(math.log(low), math.log(high))))))


def reward_range(rewards: Sequence[float]) -> float:
    """Largest minus smallest reward of a group; 0 means no advantage and nothing to learn."""
    return max(rewards) - min(rewards)


def split_groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in groups of `size`, as they stand side by side."""
    return [items[start : start + size] for start in range(0, len(items), size)]
