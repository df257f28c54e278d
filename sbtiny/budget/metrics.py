"""What an evaluation reports: accuracy, tokens, and how close lengths came to their budgets.

Lengths are in tokens, rates from 0 to 1. Every figure is a plain Python number, or None where it is undefined, so that a
report can be written as JSON.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sbtiny.budget.reward import relative_mismatch
from sbtiny.errors import InputError

TOLERANCES = (0.1, 0.2, 0.5)
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered question.

    `ok`: the format was right. `budget`: stated or given, None without one. `length`: tokens of the solution body, or of
    the whole completion where it is malformed.
    """

    correct: bool
    ok: bool
    budget: int | None
    length: int
    level: int | str | None = None


def summarise(samples: Sequence[Sample]) -> dict:
    """Compute the measures of `eval.json` that need the samples alone. Raises InputError for no samples.

    `within` is a share of all samples; a malformed one is not within. `mean_budget`, `over_budget_rate`, the correlations
    and `slope` (least squares, length on budget) cover the samples with a budget, cut ones included.
    """
    if not samples:
        raise InputError("no samples to summarise: the evaluation answered no question")
    right = [float(s.correct) for s in samples]
    lengths = [s.length for s in samples]
    return {
        "accuracy": _mean(right),
        "accuracy_ci95": _wilson_ci95(_mean(right), len(right)),
        "mean_tokens": _mean(lengths),
        "median_tokens": float(np.median(lengths)),
        "p90_tokens": float(np.percentile(lengths, 90)),
        "format_rate": _mean([s.ok for s in samples]),
        **_adherence(samples),
        "by_level": _by_level(samples),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Compute the rank correlation; ties share their mean rank. None when a side is constant or there are fewer than two pairs."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def least_squares_slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute the slope of y on x, with an intercept. None when x is constant or there are fewer than two pairs."""
    if len(set(x)) < 2:
        return None
    centred = np.asarray(x, float) - np.mean(x)
    return float(centred @ np.asarray(y, float) / (centred @ centred))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Compute mean, lo and hi (95 % bootstrap interval) of a - b over the same questions in the same order.

    Raises InputError for unequal or empty lists. Most noise is the difficulty of the questions; pairing removes it.
    """
    if len(a) != len(b) or len(a) == 0:
        raise InputError(f"a paired difference needs the same questions twice: got {len(a)} and {len(b)} values")
    differences = np.asarray(a, float) - np.asarray(b, float)
    lo, hi = _bootstrap_ci95(differences, seed)
    return {"mean": _mean(differences), "lo": lo, "hi": hi}


def is_within(sample: Sample, tolerance: float) -> bool:
    """Whether the answer was well formed and its length is at most `tolerance`, as a share, from its budget."""
    return sample.ok and sample.budget is not None and relative_mismatch(sample.length, sample.budget) <= tolerance


def compression(base_mean: float, mean: float) -> float:
    """Compute the share of the base's tokens that was saved, negative when answers grew. Raises InputError for a base of 0."""
    if not base_mean > 0:
        raise InputError(f"compression needs a base that wrote something: its mean is {base_mean} tokens")
    return 1 - mean / base_mean


def _adherence(samples: Sequence[Sample]) -> dict:
    """Compute the measures that need budgets."""
    budgeted = [s for s in samples if s.budget is not None]
    budgets, lengths = [s.budget for s in budgeted], [s.length for s in budgeted]
    levelled = [s for s in budgeted if _is_numeric(s.level)]
    return {
        "mean_budget": _mean(budgets),
        "within": {str(t): _within(samples, t) if budgeted else None for t in TOLERANCES},
        "over_budget_rate": _mean([s.length > s.budget for s in budgeted]),
        "spearman_budget_length": spearman(budgets, lengths),
        "spearman_budget_level": spearman([s.budget for s in levelled], [int(s.level) for s in levelled]),
        "slope": least_squares_slope(budgets, lengths),
    }


def _within(samples: Sequence[Sample], tolerance: float) -> float | None:
    return _mean([is_within(s, tolerance) for s in samples])


def _by_level(samples: Sequence[Sample]) -> dict[str, dict]:
    """Compute one entry a level, sorted numbers first. Samples without a level are left out."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.level is not None:
            groups.setdefault(str(sample.level), []).append(sample)
    ordered = sorted(groups, key=lambda name: (0, int(name), "") if _is_numeric(name) else (1, 0, name))
    return {name: _level(groups[name]) for name in ordered}


def _level(samples: Sequence[Sample]) -> dict:
    return {
        "questions": len(samples),
        "accuracy": _mean([s.correct for s in samples]),
        "mean_tokens": _mean([s.length for s in samples]),
        "mean_budget": _mean([s.budget for s in samples if s.budget is not None]),
    }


def _is_numeric(level: int | str | None) -> bool:
    return isinstance(level, int) or (isinstance(level, str) and level.isdecimal())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Compute ranks from 1, (n,). Equal values share the mean of the ranks they span."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _wilson_ci95(rate: float, n: int) -> list[float]:
    """Compute [lo, hi], Wilson's interval of a rate. A bootstrap's would have no width where all are right, or none."""
    z2 = 1.959964**2 / n
    centre, half = rate + z2 / 2, math.sqrt(z2 * rate * (1 - rate) + z2**2 / 4)
    lo, hi = ((centre + side) / (1 + z2) for side in (-half, half))
    return [max(0.0, round(lo, 12)), round(hi, 12)]  # a 1 that is not quite 1 would be told as less than all


def _bootstrap_ci95(values: Sequence[float], seed: int) -> list[float]:
    """Compute [lo, hi] of the mean under resampling with replacement. The two are equal when all values are."""
    rng, data = np.random.default_rng(seed), np.asarray(values, float)
    # One resample at a time: all at once would take 2000 x n x 8 bytes.
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    return [float(edge) for edge in np.percentile(means, [2.5, 97.5])]
