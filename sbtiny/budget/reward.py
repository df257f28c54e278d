"""The reward of one completion, and the window's width over time (SelfBudgeter, arXiv 2505.11274).

    malformed            r_f
    well formed          P_B(b, b_max) + PreB(s_min, s_max, l, b, a, b_best)

l is the length and b the budget in tokens, a (alpha) the half width of the window |l - b| <= a b. Two pieces beyond the
paper, `slope` and `centre`, answer its dead zone (flat outside the window, the peak on its edge) and are off unless asked for.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sbtiny.errors import InputError

Schedule = Literal["linear", "cosine", "fixed"]
ROUNDING = 1e-9  # 0.5 - 0.4 - 0.1 is a little below 0


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """The reward's constants; the defaults are the paper's. Raises InputError when they would reward the worse answer.

    `correct` and `wrong` are (s_min, s_max). `slope` is the most that a length outside the window loses below s_min,
    reached at e times the window's edge; the paper is flat there (0). `centre` moves the peak from the window's edge
    (0, the paper) to l = b (1).
    """

    r_f: float = -1.0
    r_b: float = -0.4
    correct: tuple[float, float] = (0.5, 1.0)
    wrong: tuple[float, float] = (-0.5, 0.0)
    slope: float = 0.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.r_f, self.r_b, *self.correct, *self.wrong, self.slope, self.centre)
        if not all(math.isfinite(number) for number in numbers):
            raise InputError(f"reward: every number must be finite, not {numbers}")
        for name, (low, high) in (("correct", self.correct), ("wrong", self.wrong)):
            if low >= high:
                raise InputError(f"reward.{name}: s_min {low} must be below s_max {high}")
        if self.r_b > 0:
            raise InputError(f"reward.r_b: {self.r_b} would pay for a budget above b_max: use 0 or less")
        if self.slope < 0:
            raise InputError(f"reward.slope: {self.slope} would pay for breaking the budget: use 0 or more")
        if not 0 <= self.centre <= 1:
            raise InputError(f"reward.centre: {self.centre} is not between 0 (the window's edge) and 1 (l = b)")
        self._check_order("correct s_min", self.correct[0], "wrong s_max", self.wrong[1])
        self._check_order("wrong s_min", self.wrong[0], "r_f", self.r_f)

    def _check_order(self, better: str, value: float, worse: str, limit: float) -> None:
        """The better kind of answer, at its very worst, must not earn less than the worse kind at its best."""
        lowest = value + self.r_b - self.slope
        if lowest < limit - ROUNDING:
            sums = f"{better} {value} + r_b {self.r_b} - slope {self.slope} = {lowest:.4g}"
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


def score(
    *, budget: int | None, length: int, correct: bool, b_max: float, alpha: float, config: RewardConfig = DEFAULT
) -> Reward:
    """The reward of one completion, part by part.

    `budget` is None for a malformed completion. `b_max` is the length of the initial model's own answer in tokens,
    math.inf when that was wrong. Raises ValueError unless budget >= 1, length >= 0 and alpha > 0.
    """
    if budget is None:
        return Reward(config.r_f, config.r_f, 0.0, 0.0, False)
    if budget < 1 or length < 0 or not alpha > 0:
        raise ValueError(f"budget {budget}, length {length}, alpha {alpha}: out of range")
    s_min, s_max = config.correct if correct else config.wrong
    shift = alpha * (1 - config.centre)
    b_best = (1 - shift if correct else 1 + shift) * budget
    away = min(1.0, log_distance(length, budget, alpha))
    adherence = preb(s_min, s_max, length, budget, alpha, b_best) - config.slope * away
    penalty = config.r_b if budget > b_max else 0.0
    return Reward(penalty + adherence, 0.0, penalty, adherence, mismatch(length, budget) <= alpha)


def preb(s_min: float, s_max: float, length: float, budget: float, alpha: float, b_best: float) -> float:
    """PreB: s_max at l = b_best, down a half cosine over the window's width of 2ab; s_min, flat, outside it."""
    if mismatch(length, budget) > alpha:
        return s_min
    phase = math.pi * abs(length - b_best) / (2 * alpha * budget)
    return s_min + (s_max - s_min) * (1 + math.cos(phase)) / 2


def mismatch(length: float, budget: float) -> float:
    """|l - b| / b."""
    return abs(length - budget) / budget


def log_distance(length: float, budget: float, alpha: float) -> float:
    """How far a length lies outside the window, as the logarithm of its ratio to the nearer edge; 0 inside.

    Measured from the edge that was crossed, so that it grows from 0 on both sides; math.inf for a length of 0.
    """
    if mismatch(length, budget) <= alpha:
        return 0.0
    if length > budget:
        return max(0.0, math.log(length / ((1 + alpha) * budget)))
    return max(0.0, math.log((1 - alpha) * budget / length)) if length else math.inf


def alpha_after(step: int, total_steps: int, start: float = 6.0, end: float = 0.1, schedule: Schedule = "linear") -> float:
    """From `start` at step 0 to `end` at `total_steps`, exact at both and clamped beyond; `linear` is the paper's.

    `cosine` leaves slowly and arrives slowly; `fixed` is `end` from the first step on.
    """
    done = min(1.0, max(0.0, step / total_steps)) if total_steps > 0 else 1.0
    if schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    elif schedule == "fixed":
        done = 1.0
    return start * (1 - done) + end * done
