"""The reward of one completion, and the window's width over time (SelfBudgeter, arXiv 2505.11274).

    malformed            r_f
    well formed          P_B(b, b_max) + PreB(s_min, s_max, l, b, a, b_best)

l is the length and b the budget in tokens, a (alpha) the half width of the window |l - b| <= a b. The paper's reward is flat
outside the window and peaks on its edge. `outside_slope` and `reward_peak`, both beyond the paper and off by default, change that.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sbtiny.errors import InputError

Schedule = Literal["linear", "cosine", "fixed"]
ROUNDING = 1e-9  # 0.5 - 0.4 - 0.1 is a little below 0


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """The reward's constants, by default the paper's. Raises InputError when a worse answer could earn more.

    `correct` and `wrong` are (s_min, s_max). `outside_slope` is the largest loss below s_min outside the window,
    reached at e times the window's edge; 0 is the paper's. `reward_peak` moves the peak from the window's edge
    (0, the paper) to l = b (1).
    """

    r_f: float = -1.0
    r_b: float = -0.4
    correct: tuple[float, float] = (0.5, 1.0)
    wrong: tuple[float, float] = (-0.5, 0.0)
    outside_slope: float = 0.0
    reward_peak: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.r_f, self.r_b, *self.correct, *self.wrong, self.outside_slope, self.reward_peak)
        if not all(math.isfinite(number) for number in numbers):
            raise InputError(f"reward: every number must be finite, not {numbers}")
        for name, (low, high) in (("correct", self.correct), ("wrong", self.wrong)):
            if low >= high:
                raise InputError(f"reward.{name}: s_min {low} must be below s_max {high}")
        if self.r_b > 0:
            raise InputError(f"reward.r_b: {self.r_b} would pay for a budget above b_max: use 0 or less")
        if self.outside_slope < 0:
            raise InputError(f"reward.outside_slope: {self.outside_slope} would pay for breaking the budget: use 0 or more")
        if not 0 <= self.reward_peak <= 1:
            raise InputError(f"reward.reward_peak: {self.reward_peak} is not between 0 (the window's edge) and 1 (l = b)")
        self._check_order("correct s_min", self.correct[0], "wrong s_max", self.wrong[1])
        self._check_order("wrong s_min", self.wrong[0], "r_f", self.r_f)

    def _check_order(self, better: str, value: float, worse: str, limit: float) -> None:
        """Require that the lowest reward of the better kind of answer is at least the highest of the worse kind."""
        lowest = value + self.r_b - self.outside_slope
        if lowest < limit - ROUNDING:
            sums = f"{better} {value} + r_b {self.r_b} - slope {self.outside_slope} = {lowest:.4g}"
            raise InputError(f"reward: {sums} must not be below {worse} {limit}: use a smaller penalty or slope")


DEFAULT = RewardConfig()


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward and its parts: total = format + budget_penalty + adherence; `inside`: the length is in the window."""

    total: float
    format: float
    budget_penalty: float
    adherence: float
    inside: bool


def compute_reward(*, budget: int | None, length: int, correct: bool, b_max: float, alpha: float, config: RewardConfig = DEFAULT) -> Reward:
    """Compute the reward of one completion and its parts.

    `budget` is None for a malformed completion. `b_max` is the length of the initial model's own answer in tokens,
    math.inf when it was wrong. Raises ValueError unless budget >= 1, length >= 0 and alpha > 0.
    """
    if budget is None:
        return Reward(config.r_f, config.r_f, 0.0, 0.0, False)
    if budget < 1 or length < 0 or not alpha > 0:
        raise ValueError(f"budget {budget}, length {length}, alpha {alpha}: out of range")
    s_min, s_max = config.correct if correct else config.wrong
    shift = alpha * (1 - config.reward_peak)
    b_best = (1 - shift if correct else 1 + shift) * budget
    away = min(1.0, log_distance(length, budget, alpha))
    adherence = preb(s_min, s_max, length, budget, alpha, b_best) - config.outside_slope * away
    penalty = config.r_b if budget > b_max else 0.0
    return Reward(penalty + adherence, 0.0, penalty, adherence, relative_mismatch(length, budget) <= alpha)


def preb(s_min: float, s_max: float, length: float, budget: float, alpha: float, b_best: float) -> float:
    """Compute PreB: s_max at l = b_best, falling along a half cosine over the window's width of 2ab; s_min outside it."""
    if relative_mismatch(length, budget) > alpha:
        return s_min
    phase = math.pi * abs(length - b_best) / (2 * alpha * budget)
    return s_min + (s_max - s_min) * (1 + math.cos(phase)) / 2


def relative_mismatch(length: float, budget: float) -> float:
    """Compute |l - b| / b."""
    return abs(length - budget) / budget


def log_distance(length: float, budget: float, alpha: float) -> float:
    """Compute the distance of a length from the window: the logarithm of its ratio to the edge it crossed.

    It is 0 inside, grows from 0 on both sides, and is math.inf for a length of 0.
    """
    if relative_mismatch(length, budget) <= alpha:
        return 0.0
    if length > budget:
        return max(0.0, math.log(length / ((1 + alpha) * budget)))
    return max(0.0, math.log((1 - alpha) * budget / length)) if length else math.inf


def scheduled_alpha(step: int, total_steps: int, start: float = 6.0, end: float = 0.1, schedule: Schedule = "linear") -> float:
    """Move from `start` at step 0 to `end` at `total_steps`, exact at both and clamped beyond. `linear` is the paper's.

    `cosine` is slow at both ends; `fixed` is `end` from the first step.
    """
    done = min(1.0, max(0.0, step / total_steps)) if total_steps > 0 else 1.0
    if schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    elif schedule == "fixed":
        done = 1.0
    return start * (1 - done) + end * done
