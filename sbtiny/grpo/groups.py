"""What the groups of a GRPO step are asked: to say a number themselves, to keep a user's, or to finish when cut. Pure."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbtiny.config import GrpoSettings

Kind = Literal["self", "user", "cut"]
CUTS = (0.2, 0.9)  # a cut group is stopped at a share of the model's own number between these


@dataclass(frozen=True, slots=True)
class Group:
    """`budget` is prefilled, None where the model says its own; `ceiling` is where the body is cut, in tokens."""

    kind: Kind
    budget: int | None = None
    ceiling: int | None = None


SELF = Group("self")


def kinds(count: int, g: GrpoSettings, rng: random.Random) -> list[Kind]:
    """The kind of each of `count` groups, drawn one by one by `user_share` and `cut_share`; the rest are self-set."""
    return rng.choices(("user", "cut", "self"), (g.user_share, g.cut_share, 1 - g.user_share - g.cut_share), k=count)


def deal(kind: Kind, own: int | None, longest: float, g: GrpoSettings, rng: random.Random) -> Group:
    """A group of that kind. `own`: the number the model itself says, None for none; `longest`: b_max of the question.

    A user's number is drawn evenly in the logarithm between multiples of the model's own. What the initial model wrote bounds it,
    unless twice the own number is more: beyond that the model has nothing to say.
    """
    if kind == "self" or own is None:
        return SELF
    if kind == "cut":
        natural = min(own, longest)
        return Group("cut", own, max(1, int(natural * rng.uniform(*CUTS))))
    low, high = g.user_low * own, min(g.user_high * own, max(longest, 2 * own))
    low = min(low, high)
    return Group("user", max(1, round(math.exp(rng.uniform(math.log(low), math.log(high))))))


def spread(rewards: Sequence[float]) -> float:
    """Largest minus smallest reward of a group: without spread there is no advantage and nothing to learn."""
    return max(rewards) - min(rewards)
