"""Seconds and tokens: the measured rate, the seconds an answer still takes, and a budget in seconds. The caller gives the clock."""

import math
from collections import deque
from dataclasses import dataclass

from sbtiny.budget.remaining import Remaining

KEPT_SECONDS = 30  # of whose rates the spread is measured
LEAST_SPREAD = 0.02  # with the length known, times are foretold within about 2 %
NORMAL_Q90 = 1.2816  # standard deviations from the mean to the 90 % quantile


@dataclass(frozen=True, slots=True)
class SecondsLeft:
    """Seconds left, and a band around them; `high` is None where it is open."""

    seconds: float
    low: float
    high: float | None


class Rate:
    """Tokens per second over about the last `window` seconds."""

    def __init__(self, window: float = 1.0) -> None:
        self.window, self.total = window, 0
        self.marks: deque[tuple[float, int]] = deque()  # (time, tokens until then)
        self.earlier: deque[float] = deque(maxlen=KEPT_SECONDS)  # rates of whole windows
        self._window_start: tuple[float, int] | None = None
        self._before_pause: float | None = None

    def record(self, tokens: int, now: float) -> None:
        """Count tokens that came at `now`. The first call starts the clock: its tokens took an unknown time."""
        if self.marks and now < self.marks[-1][0]:
            raise ValueError(f"the clock went back from {self.marks[-1][0]} to {now}")
        self.total += tokens
        self.marks.append((now, self.total))
        self._drop_old(now)
        start = self._window_start = self._window_start or self.marks[0]
        if now - start[0] >= self.window:
            self.earlier.append((self.total - start[1]) / (now - start[0]))
            self._window_start = self.marks[-1]

    def pause(self, now: float) -> None:
        """Stop the clock while nothing is to come: the rate stands until two more records."""
        self._before_pause = self.per_second(now)
        self.marks.clear()
        self._window_start = None

    def per_second(self, now: float) -> float | None:
        """Compute the rate; None before two records. It falls while nothing comes."""
        self._drop_old(now)
        if len(self.marks) < 2:
            return self._before_pause
        (first, before), (last, total) = self.marks[0], self.marks[-1]
        end = now if now - last > self.window else last
        return (total - before) / (end - first) if end > first else None

    def spread(self) -> float:
        """Compute the share by which the rate of one window in ten lies above the mean, at least LEAST_SPREAD."""
        if len(self.earlier) < 3:
            return LEAST_SPREAD
        mean = sum(self.earlier) / len(self.earlier)
        variance = sum((rate - mean) ** 2 for rate in self.earlier) / (len(self.earlier) - 1)
        return max(LEAST_SPREAD, NORMAL_Q90 * math.sqrt(variance) / mean) if mean else LEAST_SPREAD

    def _drop_old(self, now: float) -> None:
        """Drop marks that the window does not reach; two stay, so that a slow model has a rate too."""
        while len(self.marks) > 2 and self.marks[1][0] <= now - self.window:
            self.marks.popleft()


def seconds_left(
    remaining: Remaining,
    decode_rate: float | None,
    *,
    wait: float = 0.0,
    prompt_tokens: int = 0,
    prompt_rate: float | None = None,
    spread: float = LEAST_SPREAD,
) -> SecondsLeft | None:
    """Compute wait + prompt tokens / prompt rate + tokens left / decode rate, with the band of the tokens and of the rate.

    `decode_rate`: tokens per second of this one answer, beside the others. None where a rate or the tokens left are not known.
    """
    if remaining.tokens is None or not decode_rate or (prompt_tokens and not prompt_rate):
        return None
    before = wait + (prompt_tokens / prompt_rate if prompt_tokens else 0.0)
    least = remaining.tokens if remaining.low is None else remaining.low
    low = before + least / (decode_rate * (1 + spread))
    high = None if remaining.high is None else before + remaining.high / (decode_rate * max(1 - spread, 0.1))
    return SecondsLeft(before + remaining.tokens / decode_rate, low, high)


def tokens_in(seconds: float, rate: float) -> int:
    """Compute the budget in tokens of a budget in seconds, at least 1. Raises ValueError unless both are above 0 and finite."""
    if not (0 < seconds < math.inf and 0 < rate < math.inf):
        raise ValueError(f"{seconds} seconds at {rate} tokens per second: both must be above 0")
    return max(1, int(seconds * rate))
