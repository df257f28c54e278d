"""The length left of a running answer, from how much of their budgets the calibration answers used."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUNDING = 1e-7  # tokens; 34 / 30 x 30 is a little above 34


@dataclass(frozen=True, slots=True)
class Remaining:
    """Tokens left, and the band that 80 % of like answers ended in.

    None: not known, because the like answers were cut or there are none. `over`: share by which the budget is passed, 0 before.
    """

    tokens: int | None
    low: int | None
    high: int | None
    over: float = 0.0


Foretell = Callable[[int, int], Remaining]  # stated and used tokens -> those left


def estimate_remaining(stated: int, used: int, ratios: Sequence[float] = (), cut: int = 0) -> Remaining:
    """Estimate what is left after `used` tokens of a budget. `ratios`: sorted, used / stated of whole answers. `cut`: further ones.

    It is the larger of stated - used and the median of what was left of the answers that went beyond this share; low and high are their
    10 and 90 % quantiles. Cut answers went beyond every share. Raises ValueError unless stated >= 1 and used >= 0. Takes microseconds.
    """
    if stated < 1 or used < 0:
        raise ValueError(f"stated {stated}, used {used}: out of range")
    share = used / stated
    first = bisect_right(ratios, share)
    beyond = len(ratios) - first + cut

    def left(level: float) -> int | None:
        index = first + int(level * beyond)
        return math.ceil((ratios[index] - share) * stated - ROUNDING) if index < len(ratios) else None

    over = max(0.0, share - 1)
    median, low, high = left(0.5), left(0.1), left(0.9)
    planned = max(0, stated - used)
    if not beyond:  # nothing to go by but the budget
        return Remaining(planned or None, None, None, over)
    tokens = None if median is None else max(planned, median)
    return Remaining(tokens, low if tokens is None or low is None else min(low, tokens), high if high is None else max(high, tokens), over)
