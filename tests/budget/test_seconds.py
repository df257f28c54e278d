"""Rates from given clock values, seconds left with their band, and budgets in seconds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.remaining import Remaining
from sbtiny.budget.seconds import FEWEST_MARKS, LEAST_SPREAD, UNMEASURED, Rate, SecondsLeft, seconds_left, tokens_in


def test_a_rate_is_the_mean_over_the_last_second() -> None:
    rate = Rate()
    assert rate.per_second(0.0) is None
    rate.record(50, 0.0)  # a prompt, say: its tokens took an unknown time
    assert rate.per_second(0.0) is None
    for step in range(1, 101):
        rate.record(1, step / 50)
    assert rate.per_second(2.0) == pytest.approx(50)
    for step in range(1, 11):
        rate.record(1, 2 + step / 10)
    assert rate.per_second(3.0) == pytest.approx(10)


def test_a_slow_model_has_a_rate_too_and_a_stalled_one_falls() -> None:
    rate = Rate()
    rate.record(1, 0.0)
    rate.record(1, 5.0)
    assert rate.per_second(5.5) == pytest.approx(0.2)
    assert rate.per_second(25.0) == pytest.approx(1 / 25)


def test_tokens_at_one_moment_and_a_clock_that_goes_back() -> None:
    rate = Rate()
    rate.record(1, 1.0)
    rate.record(1, 1.0)
    assert rate.per_second(1.0) is None
    with pytest.raises(ValueError, match=r"went back from 1\.0 to 0\.5"):
        rate.record(1, 0.5)


@given(st.floats(0.5, 2000), st.integers(2, 400))
def test_a_steady_rate_is_found(per_second: float, steps: int) -> None:
    rate = Rate()
    for step in range(steps):
        rate.record(1, step / per_second)
    assert rate.per_second((steps - 1) / per_second) == pytest.approx(per_second, rel=1e-6)
    low, high = rate.errors(20 / per_second)
    assert UNMEASURED[0] <= low <= 1 - LEAST_SPREAD < 1 + LEAST_SPREAD <= high <= UNMEASURED[1] + 0.2
    assert len(rate.marks) <= max(per_second + 3, FEWEST_MARKS)


def test_the_errors_are_those_of_times_of_this_length() -> None:
    """Of a rate that halves every other half second, short times are foretold badly and those of whole seconds well."""
    rate, now = Rate(), 0.0
    for half in range(60):
        for _ in range(50):
            now += 0.01
            rate.record(1 if half % 2 else 2, now)
    low, high = rate.errors(0.1)
    assert (low, high) == (pytest.approx(0.75, abs=0.05), pytest.approx(1.5, abs=0.1))
    low, high = rate.errors(4.0)
    assert (low, high) == (pytest.approx(1 - LEAST_SPREAD, abs=0.03), pytest.approx(1 + LEAST_SPREAD, abs=0.03))
    assert Rate().errors(1.0) == UNMEASURED


def test_seconds_are_those_of_decoding() -> None:
    left = seconds_left(Remaining(100, 50, 200), 20.0, errors=(1.0, 1.0))
    assert left == SecondsLeft(5.0, 2.5, 10.0)
    wider = seconds_left(Remaining(100, 100, 100), 20.0, errors=(0.8, 1.5))
    assert wider == SecondsLeft(5.0, 4.0, 7.5)
    assert seconds_left(Remaining(100, None, None), 20.0, errors=(1.0, 1.0)) == SecondsLeft(5.0, 5.0, None)


def test_a_budget_in_seconds() -> None:
    assert tokens_in(12, 30.0) == 360
    assert tokens_in(0.001, 30.0) == 1
    for seconds, rate in ((0, 30.0), (-1, 30.0), (math.inf, 30.0), (5, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            tokens_in(seconds, rate)


def test_a_pause_keeps_the_rate_and_does_not_count_as_waiting() -> None:
    rate = Rate()
    for i in range(11):
        rate.record(1, i / 10)
    rate.pause()
    assert rate.per_second(60.0) == pytest.approx(10)
    rate.record(1, 60.0)
    assert rate.per_second(60.0) == pytest.approx(10)
    for i in range(1, 41):
        rate.record(1, 60 + i / 20)
        if i == 10:  # half of the last second was before the pause
            assert rate.per_second(60.5) == pytest.approx(15)
    assert rate.per_second(62.0) == pytest.approx(20)
