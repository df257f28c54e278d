"""Seconds and tokens: the measured rate, the seconds an answer still takes, and a budget in seconds. The caller gives the clock."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from sbtiny.budget.remaining import Remaining

KEPT_SECONDS = 30  # of decoding, by which the rate's errors are measured
GRAIN = 0.02  # seconds between two marks of them
FEWEST_MARKS = 8  # of a window
FEWEST_STARTS = 20  # moments of them to foretell from
LEAST_SPREAD = 0.02  # with the length known, times are foretold within about 2 %
UNMEASURED = (0.85, 1.15)  # the band before there are so many moments
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class SecondsLeft:
    """Seconds left, and a band around them; `high` is None where it is open."""

    seconds: float
    low: float
    high: float | None


class Rate:
    """Tokens per second over about the last `window` seconds of decoding, and how far off it was lately.

    Pauses do not count: the rate of the seconds before one holds after it.
    """

    def __init__(self, window: float = 1.0) -> None:
        self.window, self.total, self.paused = window, 0.0, 0.0  # seconds of all pauses
        self.marks: deque[tuple[float, float]] = deque()  # (seconds of decoding, tokens until then) of the window
        self.history: deque[tuple[float, float]] = deque(maxlen=round(KEPT_SECONDS / GRAIN))  # every GRAIN seconds
        self.is_paused = True

    def record(self, tokens: float, now: float) -> None:
        """Count tokens that came at `now`. The first after a pause start the clock: they took an unknown time, and do not count."""
        last = self.marks[-1][0] if self.marks else 0.0
        if self.is_paused:
            self.is_paused, self.paused = False, now - last
            tokens = 0
        if now - self.paused < last - ROUNDING:
            raise ValueError(f"the clock went back from {last + self.paused} to {now}")
        self.total += tokens
        self.marks.append((now - self.paused, self.total))
        self._drop_old(now - self.paused)
        if not self.history or self.marks[-1][0] - self.history[-1][0] >= GRAIN:
            self.history.append(self.marks[-1])

    def pause(self) -> None:
        """Stop the clock until the next record: nothing is to come, or a prompt is computed."""
        self.is_paused = True

    def per_second(self, now: float) -> float | None:
        """Compute the rate; None before two records. It falls while nothing comes, but in a pause."""
        if not self.marks:
            return None
        last, total = self.marks[-1]
        at = last if self.is_paused else now - self.paused
        self._drop_old(at)
        first, before = self.marks[0]
        end = at if at - last > self.window else last
        return (total - before) / (end - first) if end > first else None

    def errors(self, seconds: float) -> tuple[float, float]:
        """Compute the 5 and 95 % quantiles of time taken / time foretold, had this rate foretold times of about `seconds` lately."""
        if len(self.history) < 2:
            return UNMEASURED
        times, totals = np.array(self.history).T
        ahead = min(max(seconds, GRAIN), KEPT_SECONDS / 3)
        starts = times[(times > times[0]) & (times + ahead <= times[-1])]
        if len(starts) < FEWEST_STARTS:
            return UNMEASURED
        before = np.maximum(starts - self.window, times[0])
        total = np.interp(starts, times, totals)
        foretold = (total - np.interp(before, times, totals)) / (starts - before) * ahead
        came = np.interp(starts + ahead, times, totals) - total
        low, high = np.quantile(foretold / np.maximum(came, 0.1), (0.05, 0.95))
        return min(float(low), 1 - LEAST_SPREAD), max(float(high), 1 + LEAST_SPREAD)

    def _drop_old(self, at: float) -> None:
        """Drop marks that the window does not reach. A few stay: the rate of a slow model is no matter of one step."""
        while len(self.marks) > FEWEST_MARKS and self.marks[1][0] <= at - self.window:
            self.marks.popleft()


def seconds_left(remaining: Remaining, decode_rate: float, errors: tuple[float, float]) -> SecondsLeft:
    """Compute tokens left / decode rate, with the band of the tokens and of `errors`, those of the rate (see Rate.errors).

    `decode_rate`: tokens per second of this one answer, beside the others. The tokens left must be known.
    """
    least = remaining.tokens if remaining.low is None else remaining.low
    low = least / decode_rate * errors[0]
    high = None if remaining.high is None else remaining.high / decode_rate * errors[1]
    return SecondsLeft(remaining.tokens / decode_rate, low, high)


def tokens_in(seconds: float, rate: float) -> int:
    """Compute the budget in tokens of a budget in seconds, at least 1. Raises ValueError unless both are above 0 and finite."""
    if not (0 < seconds < math.inf and 0 < rate < math.inf):
        raise ValueError(f"{seconds} seconds at {rate} tokens per second: both must be above 0")
    return max(1, int(seconds * rate))
