"""What is left of an answer: never negative, never less than the budget leaves, and from like answers beyond it."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.remaining import Remaining, estimate_remaining

RATIOS = (0.5, 0.8, 0.9, 1.0, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0)


def test_within_the_budget_it_is_what_the_budget_leaves() -> None:
    assert estimate_remaining(100, 0, RATIOS) == Remaining(110, 80, 300)
    assert estimate_remaining(100, 40, (0.6,) * 10) == Remaining(60, 20, 60)  # the median says 20
    assert estimate_remaining(100, 40) == Remaining(60, None, None)


def test_beyond_it_is_the_median_of_the_answers_that_went_further() -> None:
    assert estimate_remaining(100, 112, RATIOS) == Remaining(88, 8, 188, pytest.approx(0.12))
    assert estimate_remaining(100, 64, RATIOS).tokens == 46


def test_what_no_answer_reached_is_not_known() -> None:
    assert estimate_remaining(100, 300, RATIOS) == Remaining(None, None, None, 2.0)
    assert estimate_remaining(100, 100) == Remaining(None, None, None)
    assert estimate_remaining(100, 200, RATIOS, cut=3) == Remaining(None, 100, None, 1.0)  # three of four were cut
    assert estimate_remaining(100, 150, RATIOS, cut=1) == Remaining(150, 50, None, 0.5)


@pytest.mark.parametrize(("stated", "used"), [(0, 1), (-1, 0), (5, -1)])
def test_impossible_lengths_are_refused(stated: int, used: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        estimate_remaining(stated, used)


@given(st.integers(1, 10_000), st.integers(0, 30_000), st.lists(st.fractions(0, 4, max_denominator=500), max_size=60), st.integers(0, 5))
def test_against_the_definition(stated: int, used: int, fractions: list, cut: int) -> None:
    ratios = sorted(float(f) for f in fractions)
    left = estimate_remaining(stated, used, ratios, cut)
    beyond = sorted(math.ceil(f * stated - used) for f in fractions if f * stated > used and float(f) > used / stated) + [math.inf] * cut
    if not beyond:
        assert left.tokens == (stated - used if used < stated else None)
        assert left.low is left.high is None
    else:
        median = beyond[len(beyond) // 2]
        assert left.tokens == (None if median == math.inf else max(stated - used, median))
        if left.tokens is not None:
            assert left.low <= left.tokens
            assert left.high is None or left.high >= left.tokens
    assert all(value is None or value >= 0 for value in (left.tokens, left.low, left.high))
    assert left.over == max(0, used / stated - 1)


def test_it_is_cheap_enough_for_every_token() -> None:
    ratios = [i / 1000 for i in range(100_000)]
    started = time.perf_counter()
    for used in range(1000):
        estimate_remaining(500, used, ratios)
    assert time.perf_counter() - started < 0.5
