"""What a stated budget is worth: the promise that an answer keeps with a stated chance (one-sided split conformal prediction).

The score of an answer is used / stated. An answer that was cut or malformed has an infinite score, not the length it was cut at. The
promise at a coverage is a factor x the stated budget, and the factor one of the sorted scores (`conformal.py`).

One factor for all budgets may keep large ones less often than small ones. Where every bin of stated budgets has BIN_LEAST answers,
each bin has factors of its own. Where one bin has no finite factor at a coverage, all go by the factor of all there.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sbtiny.budget.conformal import COVERAGES, promise_rank, true_coverage_range
from sbtiny.budget.remaining import ROUNDING, Remaining, estimate_remaining
from sbtiny.errors import InputError

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
class Scores:
    """The scores of `questions` answers: the finite ones sorted; the others are infinite."""

    questions: int
    ratios: tuple[float, ...]
    confidence: float | None = None

    def factor(self, coverage: float) -> float | None:
        """Return what to multiply a stated budget by; None where no finite factor has this coverage."""
        rank = promise_rank(self.questions, coverage, self.confidence)
        return self.ratios[rank - 1] if rank is not None and rank <= len(self.ratios) else None

    def factors(self) -> dict[str, float | None]:
        return {str(c): self.factor(c) for c in COVERAGES}

    def ranges(self) -> dict[str, list[float] | None]:
        """Compute the 5 to 95 % range of the true coverage; None where there is no factor."""
        return {str(c): None if self.factor(c) is None else self._range(c) for c in COVERAGES}

    def _range(self, coverage: float) -> list[float]:
        return list(true_coverage_range(self.questions, promise_rank(self.questions, coverage, self.confidence)))


@dataclass(frozen=True)
class Bin:
    """The answers that stated a budget from `low` to `high`; `own`: they have factors of their own. `kept`: by the factor of all."""

    low: int
    high: int
    scores: Scores
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
    confidence: float | None
    questions: int
    malformed: int
    cut: int
    ratios: tuple[float, ...]
    bins: tuple[Bin, ...]
    median_stated: int | None
    date: str

    @cached_property
    def scores(self) -> Scores:
        return Scores(self.questions, self.ratios, self.confidence)

    @cached_property
    def _highs(self) -> list[int]:
        return [b.high for b in self.bins]

    def bin_of(self, stated: int) -> int | None:
        """Return the index of a budget's bin; the first and the last are open. None where there are no bins."""
        return min(bisect_left(self._highs, stated), len(self.bins) - 1) if self.bins else None

    def scores_of(self, stated: int) -> Scores:
        """Return the scores that a budget goes by: its bin's, where bins have their own, else those of all."""
        index = self.bin_of(stated)
        return self.bins[index].scores if index is not None and self.bins[index].own else self.scores

    def factor(self, stated: int, coverage: float) -> float | None:
        """Return the factor of a budget: its bin's own, unless a bin has none at this coverage, else that of all."""
        own = [b.scores.factor(coverage) for b in self.bins if b.own]
        return own[self.bin_of(stated)] if own and None not in own else self.scores.factor(coverage)

    def promise(self, stated: int, coverage: float) -> int | None:
        """Compute the tokens that an answer of this stated budget stays within, rounded up; None without a finite promise."""
        factor = self.factor(stated, coverage)
        return None if factor is None else scale_up(stated, factor)

    def remaining(self, stated: int, used: int) -> Remaining:
        """Estimate the tokens left of a running answer."""
        scores = self.scores_of(stated)
        infinite = scores.questions - len(scores.ratios)
        cut = round(infinite * self.cut / (self.cut + self.malformed)) if infinite else 0
        return estimate_remaining(stated, used, scores.ratios, cut)

    def check_matches(self, **used: Any) -> None:
        """Raise InputError if it was made with another fingerprint, format, task, temperature or top_p; None is not compared."""
        names = {"model_fingerprint": "of another model", "format": "of another format", "task": "for another task"}
        for key, value in used.items():
            if value is not None and value != (own := getattr(self, key)):
                kind = names.get(key, f"at another {key}")
                raise InputError(f"the calibration is {kind} ({key} {own}, here {value}): run sbtiny calibrate again")


def calibrate(answers: Sequence[CalibrationAnswer], confidence: float | None = None, **about: Any) -> Calibration:
    """Calibrate on one answer to each question. `about`: fingerprint, format, task, split, sampling and date."""
    scores = Scores(len(answers), finite_ratios(answers), confidence)
    stated = sorted(a.stated for a in answers if a.stated is not None)
    return Calibration(
        **about,
        confidence=confidence,
        questions=len(answers),
        malformed=sum(a.ratio == math.inf and not a.cut for a in answers),
        cut=sum(a.cut for a in answers),
        ratios=scores.ratios,
        bins=make_bins(answers, scores),
        median_stated=stated[len(stated) // 2] if stated else None,
    )


def make_bins(answers: Sequence[CalibrationAnswer], scores: Scores) -> tuple[Bin, ...]:
    """Split by stated budget into the most bins, up to MOST_BINS, that all have BIN_LEAST answers, else into MOST_BINS without factors.

    Answers that state no budget count in every bin, as infinite scores in proportion to its size.
    """
    stated = [a for a in answers if a.stated is not None]
    splits = [split_by_stated(stated, count) for count in range(MOST_BINS, 1, -1)]
    own = next((parts for parts in splits if len(parts) > 1 and min(map(len, parts)) >= BIN_LEAST), None)
    bins = []
    for part in own or (split_by_stated(stated, MOST_BINS) if stated else []):
        unstated = math.ceil((len(answers) - len(stated)) * len(part) / len(stated))
        kept = {str(c): kept_share(part, scores.factor(c)) for c in COVERAGES}
        low, high = min(a.stated for a in part), max(a.stated for a in part)
        bins.append(Bin(low, high, Scores(len(part) + unstated, finite_ratios(part), scores.confidence), own is not None, kept))
    return tuple(bins)


def split_by_stated(answers: Sequence[CalibrationAnswer], count: int) -> list[list[CalibrationAnswer]]:
    """Split into at most `count` parts of about equal size; equal budgets stay together."""
    if not answers:
        return []
    edges = sorted({int(edge) for edge in np.quantile([a.stated for a in answers], np.arange(1, count + 1) / count, method="lower")})
    parts: list[list[CalibrationAnswer]] = [[] for _ in edges]
    for answer in answers:
        parts[bisect_left(edges, answer.stated)].append(answer)
    return parts


def scale_up(stated: int, factor: float) -> int:
    """Multiply and round up to whole tokens."""
    return math.ceil(stated * factor - ROUNDING)


def kept_share(answers: Sequence[CalibrationAnswer], factor: float | None) -> float | None:
    """Compute the share of answers within factor x their stated budget; None without a factor."""
    return None if factor is None else share([a.used is not None and a.used <= scale_up(a.stated, factor) for a in answers])


def share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def finite_ratios(answers: Iterable[CalibrationAnswer]) -> tuple[float, ...]:
    return tuple(sorted(a.ratio for a in answers if a.ratio < math.inf))
