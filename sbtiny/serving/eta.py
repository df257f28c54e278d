"""The seconds until a queued body begins. Pure; `BodyQueue.sizes_ahead` gives what is ahead."""

import heapq
import math
from collections.abc import Sequence

from sbtiny.budget.seconds import LEAST_SPREAD, NORMAL_Q90, SecondsLeft

LENGTH_NOISE = 0.3  # standard deviation of an answer's length, as a share of what was stated


def estimate_start(
    ahead: Sequence[float],
    running: Sequence[float],
    slots: int,
    decode_rate: float,
    *,
    spread: float = LEAST_SPREAD,
    noise: float = LENGTH_NOISE,
) -> SecondsLeft:
    """Estimate the seconds until a body gets a slot, with a band of about 80 %.

    `ahead`: tokens of each body before it, in their order. `running`: tokens left of each answer in a slot. `decode_rate`: tokens per
    second of one answer while that many slots decode; `spread`: the share by which it varies.

    Each body ahead goes into the slot that is free first; this one gets the slot that is free first after them, at T tokens of one slot.
    All slots work until then, and their work W is the sum of at most T per slot. The errors of the lengths are independent: the standard
    deviation of T is noise x sqrt(sum of the squared lengths) / slots, over the pieces that count in W. Seconds are T / decode_rate.
    Raises ValueError for no slot or a rate that is not above 0.
    """
    if slots < 1 or not 0 < decode_rate < math.inf:
        raise ValueError(f"{slots} slots at {decode_rate} tokens per second: both must be above 0")
    free = [max(0.0, tokens) for tokens in sorted(running)[-slots:]]
    pieces = list(free)
    free += [0.0] * (slots - len(free))
    heapq.heapify(free)
    starts = [0.0] * len(pieces)
    for tokens in ahead:
        starts.append(free[0])
        pieces.append(tokens)
        heapq.heapreplace(free, free[0] + tokens)
    start = free[0]
    done = (min(tokens, start - begun) for tokens, begun in zip(pieces, starts, strict=True) if begun < start)
    deviation = NORMAL_Q90 * noise * math.sqrt(sum(tokens**2 for tokens in done)) / slots
    low, high = max(0.0, start - deviation), start + deviation
    return SecondsLeft(start / decode_rate, low / (decode_rate * (1 + spread)), high / (decode_rate * max(1 - spread, 0.1)))
