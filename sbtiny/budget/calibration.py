"""What a stated budget is worth: the promise that an answer keeps with a stated chance (one-sided split conformal prediction).

The score of an answer is used / stated. An answer that was cut or malformed has an infinite score, not the length it was cut at. The
promise at a coverage is a factor x the stated budget, and the factor one of the n sorted scores. The k-th smallest of them covers the
next one with a probability of at least k / (n + 1). Given the n scores, the share that it covers follows Beta(k, n + 1 - k), so
P(share > c) = P(Binomial(n, c) < k). Ties only raise the share.

One factor for all budgets may keep large ones less often than small ones. Where every bin of stated budgets has BIN_LEAST answers,
each bin has factors of its own. Where one bin has no finite factor at a coverage, all go by the factor of all there.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from sbtiny.budget.remaining import ROUNDING, Remaining, estimate_remaining
from sbtiny.errors import InputError

COVERAGES = (0.8, 0.9, 0.95)  # what is promised in a file
FEW, FEW_COVERAGE = 100, 0.9  # below so many answers nothing above this coverage is promised
RANGE = (0.05, 0.95)  # quantiles of the true coverage that are told
BIN_LEAST = 100  # answers of a bin with factors of its own
MOST_BINS = 4


@dataclass(frozen=True, slots=True)
class CalibrationAnswer:
    """One answer: the stated budget, None without one, and the tokens used, None where it was cut or malformed."""

    stated: int | None
    used: int | None
    cut: bool = False

    @property
    def ratio(self) -> float:
        return math.inf if self.stated is None or self.used is None else self.used / self.stated


@dataclass(frozen=True)
class NonconformityScores:
    """The scores of `questions` answers: the finite ones sorted; the others are infinite."""

    questions: int
    ratios: tuple[float, ...]
    confidence: float | None = None

    def rank(self, coverage: float) -> int | None:
        """Return the rank of the score that covers; None where it is infinite or there are too few."""
        rank = promise_rank(self.questions, coverage, self.confidence)
        return rank if rank is not None and rank <= len(self.ratios) else None

    def factor(self, coverage: float) -> float | None:
        """Return what to multiply a stated budget by; None where no finite factor has this coverage."""
        return None if (rank := self.rank(coverage)) is None else self.ratios[rank - 1]

    def factors(self) -> dict[str, float | None]:
        return {str(c): self.factor(c) for c in COVERAGES}

    def ranges(self) -> dict[str, list[float] | None]:
        """Compute the 5 to 95 % range of the true coverage; None where there is no factor."""
        return self._by_coverage(true_coverage_range)

    def kept_ranges(self, answers: int) -> dict[str, list[float] | None]:
        """Compute the 5 to 95 % range of the share that `answers` new answers keep; None where there is no factor."""
        return self._by_coverage(partial(kept_share_range, answers=answers))

    def _by_coverage(self, find_range: Callable[[int, int], tuple[float, float]]) -> dict[str, list[float] | None]:
        ranks = {str(c): self.rank(c) for c in COVERAGES}
        return {key: None if rank is None else list(find_range(self.questions, rank)) for key, rank in ranks.items()}


@dataclass(frozen=True)
class Bin:
    """The answers that stated a budget from `low` to `high`; `own`: they have factors of their own. `kept`: by the factor of all."""

    low: int
    high: int
    scores: NonconformityScores
    own: bool
    kept: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model's calibration; see the module. `median_stated`: a typical budget, None where no answer stated one."""

    model_fingerprint: str
    format: str
    task: str
    split: str
    temperature: float
    top_p: float
    questions: int
    malformed: int
    cut: int
    confidence: float | None
    median_stated: int | None
    bins: tuple[Bin, ...]
    date: str
    ratios: tuple[float, ...]
    prompt: dict[str, str | None] | None = None  # instruction and system turn; None: a file from before they were recorded

    @property
    def scores(self) -> NonconformityScores:
        return NonconformityScores(self.questions, self.ratios, self.confidence)

    @property
    def least_stated(self) -> int | None:
        """The least budget that was stated; None where none was."""
        return self.bins[0].low if self.bins else None

    def bin_of(self, stated: int) -> int | None:
        """Return the index of a budget's bin; the first and the last are open. None where there are no bins."""
        return min(bisect_left([b.high for b in self.bins], stated), len(self.bins) - 1) if self.bins else None

    def factor(self, stated: int, coverage: float) -> float | None:
        """Return the factor of a budget: its bin's own, unless a bin has none at this coverage, else that of all."""
        own = [b.scores.factor(coverage) for b in self.bins if b.own]
        return own[self.bin_of(stated)] if own and None not in own else self.scores.factor(coverage)

    def promise(self, stated: int, coverage: float) -> int | None:
        """Compute the tokens that an answer of this stated budget stays within, rounded up; None without a finite promise."""
        factor = self.factor(stated, coverage)
        return None if factor is None else scale_up(stated, factor)

    def remaining(self, stated: int, used: int) -> Remaining:
        """Estimate the tokens left of a running answer, by its bin where bins have factors of their own."""
        index = self.bin_of(stated)
        scores = self.bins[index].scores if index is not None and self.bins[index].own else self.scores
        infinite = scores.questions - len(scores.ratios)
        cut = round(infinite * self.cut / (self.cut + self.malformed)) if infinite else 0
        return estimate_remaining(stated, used, scores.ratios, cut)

    def check_matches(self, where: str, **used: Any) -> None:
        """Raise InputError, with `where`, for the first of `used` that it was not made with; what it does not say is not compared."""
        names = {"model_fingerprint": "of another model", "format": "of another format"}
        names |= {"task": "for another task", "prompt": "for another prompt"}
        for key, value in used.items():
            if (own := getattr(self, key)) not in (value, None):
                kind = names.get(key, f"at another {key}")
                raise InputError(f"{where}: the calibration is {kind} ({key} {own}, here {value}): run sbtiny calibrate again")

    def kept_coverage(self, answers: Sequence[CalibrationAnswer]) -> dict[str, dict[str, Any]]:
        """Compute the `coverage` of eval.json: the share of all answers that kept their promise, by bin too. An infinite one keeps none.

        `mean_promise`: in tokens. All are None where there is no finite promise.
        """
        stated, found = [a for a in answers if a.stated is not None], {}
        for c in COVERAGES:
            promises = [self.promise(a.stated, c) for a in stated]
            if not stated or None in promises:
                found[str(c)] = {"promised": None, "kept": None, "mean_promise": None, "by_bin": []}
                continue
            kept = [a.used is not None and a.used <= p for a, p in zip(stated, promises, strict=True)]
            parts = [[ok for ok, a in zip(kept, stated, strict=True) if self.bin_of(a.stated) == i] for i in range(len(self.bins))]
            found[str(c)] = {
                "promised": c,
                "kept": sum(kept) / len(answers),
                "mean_promise": sum(promises) / len(promises),
                "by_bin": [
                    {"from": b.low, "to": b.high, "questions": len(k), "kept": share(k)} for b, k in zip(self.bins, parts, strict=True)
                ],
            }
        return found


def calibrate(answers: Sequence[CalibrationAnswer], confidence: float | None = None, **about: Any) -> Calibration:
    """Calibrate on one answer to each question. `about`: fingerprint, format, task, split, sampling and date."""
    scores = scores_of(answers, len(answers), confidence)
    stated = sorted(a.stated for a in answers if a.stated is not None)
    return Calibration(
        **about,
        questions=len(answers),
        malformed=sum(a.ratio == math.inf and not a.cut for a in answers),
        cut=sum(a.cut for a in answers),
        confidence=confidence,
        median_stated=stated[len(stated) // 2] if stated else None,
        bins=make_bins(answers, scores),
        ratios=scores.ratios,
    )


def scores_of(answers: Sequence[CalibrationAnswer], questions: int, confidence: float | None) -> NonconformityScores:
    return NonconformityScores(questions, tuple(sorted(a.ratio for a in answers if a.ratio < math.inf)), confidence)


def make_bins(answers: Sequence[CalibrationAnswer], scores: NonconformityScores) -> tuple[Bin, ...]:
    """Split by stated budget into the most bins, up to MOST_BINS, that all have BIN_LEAST answers, else into MOST_BINS without factors.

    Answers that state no budget count in every bin, as infinite scores in proportion to its size.
    """
    stated = [a for a in answers if a.stated is not None]
    splits = [split_by_stated(stated, count) for count in range(MOST_BINS, 1, -1)] if stated else [[]]
    own = next((parts for parts in splits if len(parts) > 1 and min(map(len, parts)) >= BIN_LEAST), None)
    bins = []
    for part in own or splits[0]:
        unstated = math.ceil((len(answers) - len(stated)) * len(part) / len(stated))
        kept = {
            key: None if f is None else share([a.used is not None and a.used <= scale_up(a.stated, f) for a in part])
            for key, f in scores.factors().items()
        }
        low, high = min(a.stated for a in part), max(a.stated for a in part)
        bins.append(Bin(low, high, scores_of(part, len(part) + unstated, scores.confidence), own is not None, kept))
    return tuple(bins)


def split_by_stated(answers: Sequence[CalibrationAnswer], count: int) -> list[list[CalibrationAnswer]]:
    """Split into at most `count` parts of about equal size; equal budgets stay together."""
    edges = sorted({int(edge) for edge in np.quantile([a.stated for a in answers], np.arange(1, count + 1) / count, method="lower")})
    parts: list[list[CalibrationAnswer]] = [[] for _ in edges]
    for answer in answers:
        parts[bisect_left(edges, answer.stated)].append(answer)
    return parts


def scale_up(stated: int, factor: float) -> int:
    """Multiply and round up to whole tokens."""
    return math.ceil(stated * factor - ROUNDING)


def share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


# ---- ranks and ranges --------------------------------------------------------------------------------------------------


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


def kept_share_range(questions: int, rank: int, answers: int) -> tuple[float, float]:
    """Compute the 5 and 95 % quantiles of the share kept of m new answers, which is BetaBinomial(m, k, n + 1 - k) / m.

    It is wider than the range of the true coverage, by the chance of the m answers.
    """
    logs, i, above = log_factorials(questions + answers), np.arange(answers + 1), questions - rank
    of_order = logs[i + rank - 1] - logs[i] - logs[rank - 1] + (logs[i + above] - logs[i] - logs[above])[::-1]
    all_orders = logs[questions + answers] - logs[questions] - logs[answers]
    low, high = np.searchsorted(np.cumsum(np.exp(of_order - all_orders)), RANGE) / answers
    return float(low), float(high)


def beta_quantile(a: int, b: int, level: float) -> float:
    """Find a quantile of Beta(a, b), with whole a and b from 1, by bisection. P(Beta <= x) = P(Binomial(a + b - 1, x) >= a)."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        below = binomial_probabilities(a + b - 1, middle)[a:].sum() > level
        low, high = (low, middle) if below else (middle, high)
    return (low + high) / 2


def binomial_probabilities(n: int, p: float) -> np.ndarray:
    """Compute P(Binomial(n, p) = i) for i = 0 to n, (n + 1,), for 0 < p < 1."""
    log_factorial, i = log_factorials(n), np.arange(n + 1)
    logs = log_factorial[n] - log_factorial - log_factorial[::-1] + i * math.log(p) + (n - i) * math.log1p(-p)
    return np.exp(logs)


def log_factorials(n: int) -> np.ndarray:
    """Compute log(i!) for i = 0 to n, (n + 1,)."""
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))


def check_share(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise InputError(f"{name} {value} is no share between 0 and 1: 0.9 is 90 %")
