"""The seconds until a queued body begins. Pure; `BodyQueue` says what is ahead and what may still overtake."""

import heapq
import math
from collections.abc import Sequence

from sbtiny.budget.seconds import LEAST_SPREAD, SecondsLeft
from sbtiny.serving.queue import Overtaker

NORMAL_Q90 = 1.2816  # standard deviations from the mean to the 90 % quantile
MOST_LONGER = 5.0  # times that newcomers are taken to lengthen a wait at most: a rate of arrivals that high seldom lasts
LENGTH_NOISE = 0.3  # standard deviation of an answer's length, as a share of what was stated


def estimate_start(
    ahead: Sequence[float],
    running: Sequence[float],
    slots: int,
    decode_rate: float,
    overtakers: Sequence[Overtaker] = (),
    *,
    spread: float = LEAST_SPREAD,
    noise: float = LENGTH_NOISE,
) -> SecondsLeft:
    """Estimate the seconds until a body gets a slot, with a band that holds for about three in four.

    `ahead`: tokens of each body before it, in their order. `running`: tokens left of each answer in a slot. `decode_rate`: tokens per
    second of one answer while that many slots decode; `spread`: the share by which it varies. `noise`: of the lengths.

    1. Each body ahead goes into the slot that is free first; this one gets the slot that is free first after them: T0 seconds.
    2. Newcomers go before it: T = T0 + sum of per_second x min(T, until) x tokens / (slots x decode_rate), at most MOST_LONGER x T0;
       there `high` is None.
    3. The band is that of a gamma distribution around T. Its relative variance is r^2 / (1 + bodies ahead), r = noise x sqrt(slots), at
       most 1 (the ends of many slots come like a Poisson process), and that of the Poisson number of newcomers.

    Raises ValueError for no slot or a rate that is not above 0.
    """
    if slots < 1 or not 0 < decode_rate < math.inf:
        raise ValueError(f"{slots} slots at {decode_rate} tokens per second: both must be above 0")
    known = first_free_slot(ahead, running, slots) / decode_rate
    if not known:
        return SecondsLeft(0.0, 0.0, 0.0)
    together = slots * decode_rate
    start = add_overtakers(known, [(body.per_second * body.tokens / together, body.until) for body in overtakers])
    if start is None or start > MOST_LONGER * known:
        return SecondsLeft(MOST_LONGER * known, known / (1 + spread), None)
    coming = sum(body.per_second * min(start, body.until) * (body.tokens / together) ** 2 for body in overtakers)
    variance = min(1.0, noise**2 * slots) / (1 + len(ahead)) + coming / known**2
    low, high = gamma_band(start, variance)
    return SecondsLeft(start, low / (1 + spread), high / max(1 - spread, 0.1))


def first_free_slot(ahead: Sequence[float], running: Sequence[float], slots: int) -> float:
    """Tokens of one slot until a slot is free, after each body ahead went into the one that was free first."""
    free = [max(0.0, tokens) for tokens in sorted(running)[-slots:]]
    free += [0.0] * (slots - len(free))
    heapq.heapify(free)
    for tokens in ahead:
        heapq.heapreplace(free, free[0] + tokens)
    return free[0]


def add_overtakers(known: float, shares: list[tuple[float, float]]) -> float | None:
    """Solve T = known + sum of share x min(T, until). None where it has no end.

    `shares`: (of all slots' time that one kind of newcomer takes, seconds until it overtakes no longer).
    """
    share, past = sum(share for share, _ in shares), 0.0
    for one, until in sorted(shares, key=lambda kind: kind[1]):
        if share < 1 and (known + past) / (1 - share) <= until:
            break
        share, past = share - one, past + one * until
    return (known + past) / (1 - share) if share < 1 and past < math.inf else None


def gamma_band(mean: float, relative_variance: float) -> tuple[float, float]:
    """The 10 and 90 % quantiles of a gamma distribution, by Wilson and Hilferty's cube."""
    third = relative_variance / 9
    low, high = (max(0.0, 1 - third + sign * NORMAL_Q90 * math.sqrt(third)) ** 3 for sign in (-1, 1))
    return mean * low, mean * high
