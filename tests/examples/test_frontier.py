"""What can be had for so many tokens: by hand, and what must hold for any points."""

import pytest
from frontier import accuracy_at, hull
from hypothesis import given
from hypothesis import strategies as st

POINTS = [(100, 0.9), (20, 0.5), (40, 0.6), (60, 0.8), (30, 0.4), (200, 0.85), (60, 0.7)]
points = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 100).map(lambda n: n / 100)), min_size=1, max_size=12)


def test_the_hull_by_hand() -> None:
    assert hull(POINTS) == [(20, 0.5), (60, 0.8), (100, 0.9)]  # (40, 0.6) lies below the line, (200, 0.85) is worse for more


@pytest.mark.parametrize(("tokens", "accuracy"), [(19.9, None), (20, 0.5), (40, 0.65), (60, 0.8), (80, 0.85), (100, 0.9), (1000, 0.9)])
def test_accuracy_for_so_many_tokens(tokens: float, accuracy: float | None) -> None:
    assert accuracy_at(POINTS, tokens) == (None if accuracy is None else pytest.approx(accuracy))
    assert accuracy_at([], tokens) is None


@given(points)
def test_no_measured_point_lies_above_and_the_best_is_reached(measured: list[tuple[int, float]]) -> None:
    for tokens, accuracy in measured:
        assert accuracy_at(measured, tokens) >= accuracy - 1e-9
    assert accuracy_at(measured, 500) == max(accuracy for _, accuracy in measured)


@given(points, st.integers(1, 500), st.integers(1, 500))
def test_more_tokens_are_never_worse_and_a_mixture_is_never_better(measured: list, one: int, other: int) -> None:
    low, high = sorted((one, other))
    first = accuracy_at(measured, low)
    if first is not None:
        middle, last = accuracy_at(measured, (low + high) / 2), accuracy_at(measured, high)
        assert first <= middle + 1e-9
        assert middle <= last + 1e-9
        assert middle >= (first + last) / 2 - 1e-9  # concave
