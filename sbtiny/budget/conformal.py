"""One-sided split conformal prediction: which of n sorted scores bounds the next one, and how sure that is.

The k-th smallest of n exchangeable scores covers the next one with a probability of at least k / (n + 1). Given the n scores, the share
that it covers follows Beta(k, n + 1 - k), so P(share > c) = P(Binomial(n, c) < k). Ties only raise the share.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from sbtiny.errors import InputError

COVERAGES = (0.8, 0.9, 0.95)  # what is promised in a file
FEW = 100  # below this many answers nothing above FEW_COVERAGE is promised
FEW_COVERAGE = 0.9
ROUNDING = 1e-9  # (9 + 1) x 0.9 is a little above 9
RANGE = (0.05, 0.95)


def promise_rank(questions: int, coverage: float, confidence: float | None = None) -> int | None:
    """Choose the rank k, from 1, of the score that covers; None where `questions` are too few.

    Without `confidence`: k = ceil((n + 1) c), right on average over calibrations. With it: the least k whose calibration covers at least
    c with that probability. Raises InputError for a coverage or confidence that is no share between 0 and 1.
    """
    check_share("coverage", coverage)
    if questions < FEW and coverage > FEW_COVERAGE + ROUNDING:
        return None
    rank = math.ceil((questions + 1) * coverage - ROUNDING)
    if confidence is not None:
        check_share("confidence", confidence)
        rank = max(rank, confident_rank(questions, coverage, confidence))
    return rank if rank <= questions else None


@cache
def confident_rank(questions: int, coverage: float, confidence: float) -> int:
    """Compute the least k with P(Beta(k, n + 1 - k) >= c) >= confidence; n + 1 where no k has it."""
    below = np.cumsum(binomial_probabilities(questions, coverage))  # below[i] = P(Binomial <= i)
    return int(np.searchsorted(below[:questions], confidence - 1e-12)) + 1


def true_coverage_range(questions: int, rank: int) -> tuple[float, float]:
    """Compute the 5 and 95 % quantiles of Beta(k, n + 1 - k): where the true coverage of one calibration lies."""
    low, high = (beta_quantile(rank, questions + 1 - rank, level) for level in RANGE)
    return low, high


def beta_quantile(a: int, b: int, level: float) -> float:
    """Compute a quantile of Beta(a, b) with whole a and b, from 1. P(Beta <= x) = P(Binomial(a + b - 1, x) >= a)."""
    n = a + b - 1
    return bisect_root(lambda x: float(binomial_probabilities(n, x)[a:].sum()) - level)


def binomial_probabilities(n: int, p: float) -> np.ndarray:
    """Compute P(Binomial(n, p) = i) for i = 0 to n, (n + 1,), for 0 < p < 1."""
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    i = np.arange(n + 1)
    logs = log_factorial[n] - log_factorial - log_factorial[::-1] + i * math.log(p) + (n - i) * math.log1p(-p)
    return np.exp(logs)


def bisect_root(rising: Callable[[float], float], steps: int = 50) -> float:
    """Find the root between 0 and 1 of a rising function."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def check_share(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise InputError(f"{name} {value} is no share between 0 and 1: 0.9 is 90 %")
