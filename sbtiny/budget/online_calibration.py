"""A calibration that follows its traffic: adaptive conformal inference (Gibbs and Candes, arXiv 2106.00170).

Each coverage c has a level a, at first 1 - c, at which answers may miss. After each answer a <- a + g (1 - c - miss), so the share of
misses tends to 1 - c whatever the traffic. The promise is the (1 - a) quantile of the last WINDOW scores. All of it lies in memory: the
file stays as it was made.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from sbtiny.budget.calibration import (
    COVERAGES,
    FEW,
    FEW_COVERAGE,
    Calibration,
    CalibrationAnswer,
    NonconformityScores,
    promise_rank,
    scale_up,
    share,
)
from sbtiny.budget.remaining import ROUNDING, Remaining

WINDOW = 500
STEP = 0.01
MOST_COVERAGES = 16  # with a level of their own: those that users ask for could be any number


class OnlineCalibration:
    """Promises that adapt. Starts from the scores of a calibration, which the newest answers push out one by one.

    A coverage that has no level of its own has 1 - c. Bins with factors of their own keep them, each with a window.
    """

    def __init__(self, calibration: Calibration, coverages: Sequence[float] = COVERAGES) -> None:
        self.calibration = calibration
        by_bin = [b.scores for b in calibration.bins if b.own]
        self.window, self.bin_windows = first_window(calibration.scores), [first_window(scores) for scores in by_bin]
        self.miss_levels = {c: min(first_level(scores, c) for scores in by_bin or [calibration.scores]) for c in coverages}
        self.kept: dict[float, deque[bool]] = {}

    def promise(self, stated: int, coverage: float) -> int | None:
        """Compute the tokens that an answer of this stated budget stays within; None without a finite promise."""
        own = [self._factor(window, coverage) for window in self.bin_windows]
        use_bin = bool(own) and math.inf not in own
        factor = own[self.calibration.bin_of(stated)] if use_bin else self._factor(self.window, coverage)
        return scale_up(stated, factor) if factor < math.inf else None

    def remaining(self, stated: int, used: int) -> Remaining:
        return self.calibration.remaining(stated, used)

    def observe(self, answer: CalibrationAnswer, made: Mapping[float, int | None] | None = None) -> None:
        """Learn from a finished answer; one that was cut or malformed has missed every finite promise.

        `made`: the promises it was given, by coverage; at other coverages it is judged by the present ones.
        """
        if answer.stated is None:
            return  # it had no promise
        promises = {c: self.promise(answer.stated, c) for c in self.miss_levels} | dict(made or {})
        for coverage, promised in promises.items():
            self.adapt(coverage, None if promised is None else answer.used is not None and answer.used <= promised)
        self.window.append(answer.ratio)
        if self.bin_windows:
            self.bin_windows[self.calibration.bin_of(answer.stated)].append(answer.ratio)

    def adapt(self, coverage: float, kept: bool | None) -> None:
        """Move the level of one coverage after an answer that kept its promise or missed it; None had no finite one, which none misses."""
        if coverage not in self.miss_levels and len(self.miss_levels) >= MOST_COVERAGES:
            return
        level = self.miss_levels.get(coverage, 1 - coverage)
        self.miss_levels[coverage] = min(1.0, max(0.0, level + STEP * (1 - coverage - (kept is False))))
        if kept is not None:
            self.kept.setdefault(coverage, deque(maxlen=WINDOW)).append(kept)

    def figures(self) -> dict[float, tuple[float, float | None]]:
        """Compute by coverage the level 1 - a of its promises now, and the share of the last WINDOW promises that was kept."""
        return {c: (1 - level, share(self.kept.get(c, ()))) for c, level in self.miss_levels.items()}

    def _factor(self, window: deque[float], coverage: float) -> float:
        rank = math.ceil((len(window) + 1) * (1 - self.miss_levels.get(coverage, 1 - coverage)) - ROUNDING)
        too_few = rank > len(window) or (len(window) < FEW and coverage > FEW_COVERAGE + ROUNDING)
        return math.inf if too_few else sorted(window)[max(1, rank) - 1]


def first_window(scores: NonconformityScores) -> deque[float]:
    """The scores of a calibration in an order that mixes small and large ones, so that a window drops both alike."""
    found = [*scores.ratios, *[math.inf] * (scores.questions - len(scores.ratios))]
    golden = (math.sqrt(5) - 1) / 2  # its multiples are spread evenly
    return deque((found[i] for i in sorted(range(len(found)), key=lambda i: i * golden % 1)), WINDOW)


def first_level(scores: NonconformityScores, coverage: float) -> float:
    """1 - c, or below it where the calibration has a confidence: that of its rank."""
    if scores.confidence is None:
        return 1 - coverage
    return 1 - (promise_rank(scores.questions, coverage, scores.confidence) or scores.questions + 1) / (scores.questions + 1)
