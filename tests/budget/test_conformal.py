"""Ranks and ranges of split conformal prediction: known values, exact sums, and a simulation."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.calibration import (
    COVERAGES,
    RANGE,
    beta_quantile,
    binomial_probabilities,
    kept_share_range,
    promise_rank,
    true_coverage_range,
)
from sbtiny.errors import InputError


def chance_of_at_least(n: int, k: int, c: Fraction) -> Fraction:
    """P(Beta(k, n + 1 - k) >= c), exactly."""
    return sum((comb(n, i) * c**i * (1 - c) ** (n - i) for i in range(k)), Fraction(0))


@pytest.mark.parametrize(
    ("n", "c", "confidence", "rank"),
    [
        (500, 0.9, None, 451),
        (500, 0.9, 0.95, 462),
        (500, 0.8, None, 401),
        (500, 0.95, None, 476),
        (9, 0.9, None, 9),
        (8, 0.9, None, None),
        (29, 0.9, 0.95, 29),
        (28, 0.9, 0.95, None),
        (4, 0.8, None, 4),
        (3, 0.8, None, None),
        (99, 0.95, None, None),  # below 100 only 80 and 90 % are promised
        (100, 0.95, None, 96),
        (99, 0.9, None, 90),
        (0, 0.8, None, None),
        (1, 0.8, 0.95, None),
    ],
)
def test_known_ranks(n: int, c: float, confidence: float | None, rank: int | None) -> None:
    assert promise_rank(n, c, confidence) == rank


def test_the_range_of_true_coverage() -> None:
    assert [round(100 * edge, 1) for edge in true_coverage_range(500, 451)] == [87.7, 92.1]


@pytest.mark.parametrize(("answers", "edges"), [(500, [86.8, 93.0]), (50, [82.0, 96.0]), (1, [0.0, 100.0])])
def test_the_range_of_what_new_answers_keep(answers: int, edges: list[float]) -> None:
    assert [round(100 * edge, 1) for edge in kept_share_range(500, 451, answers)] == edges


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_the_range_of_what_is_kept_leaves_out_a_twentieth_at_either_side(n: int, m: int, data: st.DataObject) -> None:
    """Of the orders of n old and m new scores, those where exactly i new ones are below the k-th old one."""
    k = data.draw(st.integers(1, n))
    chances = [Fraction(comb(i + k - 1, i) * comb(m - i + n - k, m - i), comb(m + n, m)) for i in range(m + 1)]
    assert sum(chances) == 1
    for share, level in zip(kept_share_range(n, k, m), RANGE, strict=True):
        i = round(share * m)
        assert float(sum(chances[:i])) <= level + 1e-9
        assert float(sum(chances[: i + 1])) >= level - 1e-9


@given(st.integers(1, 300), st.sampled_from(["0.8", "0.9", "0.95"]))
def test_the_rank_is_the_least_that_covers_on_average(n: int, text: str) -> None:
    rank, exact = promise_rank(n, float(text)), Fraction(text)
    if n < 100 and exact > Fraction(9, 10):
        assert rank is None
    elif rank is None:
        assert Fraction(n, n + 1) < exact
    else:
        assert Fraction(rank, n + 1) >= exact > Fraction(rank - 1, n + 1)


@given(st.integers(1, 120), st.sampled_from(["0.8", "0.9"]), st.sampled_from(["0.5", "0.9", "0.95", "0.99"]))
def test_the_confident_rank_is_the_least_that_holds_with_that_probability(n: int, c: str, confidence: str) -> None:
    rank = promise_rank(n, float(c), float(confidence))
    least = next((k for k in range(1, n + 1) if chance_of_at_least(n, k, Fraction(c)) >= Fraction(confidence)), None)
    plain = promise_rank(n, float(c))
    assert rank == (None if least is None or plain is None else max(least, plain))


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 0.99))
def test_a_beta_quantile_is_where_its_distribution_has_the_level(a: int, b: int, level: float) -> None:
    x = beta_quantile(a, b, level)
    assert 0 < x < 1
    assert binomial_probabilities(a + b - 1, x)[a:].sum() == pytest.approx(level, abs=1e-8)


def test_quantiles_with_a_formula() -> None:
    assert beta_quantile(1, 1, 0.3) == pytest.approx(0.3)
    assert beta_quantile(5, 1, 0.5) == pytest.approx(0.5**0.2)
    assert beta_quantile(1, 7, 0.2) == pytest.approx(1 - 0.8 ** (1 / 7))


def test_many_answers_are_no_problem() -> None:
    low, high = true_coverage_range(100_000, promise_rank(100_000, 0.9))
    assert 0.898 < low < 0.9 < high < 0.902
    assert kept_share_range(500, 451, 100_000) == pytest.approx(true_coverage_range(500, 451), abs=2e-4)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, 90, float("nan"), "0.9"])
def test_what_is_no_share_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"coverage .* is no share between 0 and 1"):
        promise_rank(500, value)
    with pytest.raises(InputError, match=r"confidence .* is no share between 0 and 1"):
        promise_rank(500, 0.9, value)


@pytest.mark.parametrize("c", COVERAGES)
def test_a_thousand_calibrations_cover_as_the_beta_distribution_says(c: float) -> None:
    """Scores uniform from 0 to 1: the true coverage of a calibration is its factor."""
    n, rank = 500, promise_rank(500, c)
    factors = np.sort(np.random.default_rng(0).random((1000, n)), axis=1)[:, rank - 1]
    low, high = true_coverage_range(n, rank)
    assert abs(factors.mean() - rank / (n + 1)) < 0.002
    assert 0.87 < ((low <= factors) & (factors <= high)).mean() < 0.93
    sure = np.sort(np.random.default_rng(1).random((1000, n)), axis=1)[:, promise_rank(n, c, 0.95) - 1]
    assert 0.93 < (sure >= c).mean() < 0.98
