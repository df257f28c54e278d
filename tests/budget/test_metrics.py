"""The report's numbers, by hand where a hand can do it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.metrics import (
    Sample,
    compression,
    least_squares_slope,
    paired_difference,
    spearman,
    summarise,
)
from sbtiny.errors import InputError

SAMPLES = [
    Sample(True, True, 100, 90, 2),  # off by 10 %
    Sample(True, True, 100, 120, 2),  # 20 %, over
    Sample(False, True, 200, 100, 10),  # 50 %
    Sample(True, True, 50, 200, 10),  # 300 %, over
    Sample(False, False, None, 400, None),  # malformed
]


def test_summary_by_hand():
    report = summarise(SAMPLES)
    assert report["accuracy"] == 0.6
    assert (report["mean_tokens"], report["median_tokens"]) == (182, 120)
    assert report["p90_tokens"] == pytest.approx(320)
    assert report["mean_budget"] == 112.5
    assert report["format_rate"] == 0.8
    assert report["within"] == {"0.1": 0.2, "0.2": 0.4, "0.5": 0.6}
    assert report["over_budget_rate"] == 0.5
    assert report["slope"] == pytest.approx(-6375 / 11875)
    # ranks of budgets 2.5 2.5 4 1, of lengths 1 3 2 4: covariance -3 over sqrt(4.5 * 5)
    assert report["spearman_budget_length"] == pytest.approx(-3 / (4.5 * 5) ** 0.5)
    # ranks of levels 1.5 1.5 3.5 3.5
    assert report["spearman_budget_level"] == pytest.approx(0)
    assert list(report["by_level"]) == ["2", "10"]
    assert report["by_level"]["2"] == {"questions": 2, "accuracy": 1.0, "mean_tokens": 105.0, "mean_budget": 100.0}
    assert report["by_level"]["10"] == {"questions": 2, "accuracy": 0.5, "mean_tokens": 150.0, "mean_budget": 125.0}


def test_a_report_is_json_and_repeats():
    report = summarise(SAMPLES)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert summarise(SAMPLES) == report


def test_a_base_model_without_budgets():
    report = summarise([replace(s, ok=False, budget=None) for s in SAMPLES])
    assert report["within"] == {"0.1": None, "0.2": None, "0.5": None}
    for name in ("mean_budget", "over_budget_rate", "spearman_budget_length", "spearman_budget_level", "slope"):
        assert report[name] is None
    assert report["by_level"]["2"]["mean_budget"] is None
    assert report["accuracy"] == 0.6


def test_a_cut_answer_is_not_within_its_budget_but_can_be_over_it():
    report = summarise([Sample(False, False, 100, 100), Sample(False, False, 100, 101)])
    assert report["within"]["0.5"] == 0
    assert report["over_budget_rate"] == 0.5


def test_nothing_to_summarise():
    with pytest.raises(InputError, match="no samples"):
        summarise([])


def test_levels_may_be_words_or_numbers_in_words():
    report = summarise([Sample(True, True, 10, 10, level) for level in ("hard", "10", "9", 9, "easy")])
    assert list(report["by_level"]) == ["9", "10", "easy", "hard"]
    assert report["by_level"]["9"]["questions"] == 2
    words = [Sample(True, True, b, 10, level) for b, level in ((10, "1"), (20, "2"), (5, "hard"))]
    assert summarise(words)["spearman_budget_level"] == pytest.approx(1)


def test_the_accuracy_interval_narrows_with_the_questions():
    few = summarise([Sample(i % 2 == 0, True, 10, 10) for i in range(100)])["accuracy_ci95"]
    many = summarise([Sample(i % 2 == 0, True, 10, 10) for i in range(1600)])["accuracy_ci95"]
    # 1.96 * sqrt(0.25 / n) is 0.098 and 0.0245
    assert few == pytest.approx([0.402, 0.598], abs=0.02)
    assert many == pytest.approx([0.4755, 0.5245], abs=0.002)


@pytest.mark.parametrize(
    ("right", "n", "interval"), [(50, 50, [0.9287, 1]), (0, 20, [0, 0.1611]), (1, 1, [0.2065, 1]), (9, 10, [0.5958, 0.9821])]
)
def test_the_accuracy_interval_is_wilsons(right: int, n: int, interval: list[float]):
    report = summarise([Sample(i < right, True, 10, 10) for i in range(n)])
    lo, hi = report["accuracy_ci95"]
    assert [lo, hi] == pytest.approx(interval, abs=1e-4)
    assert 0 <= lo <= report["accuracy"] <= hi <= 1


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 10, 100], [3, 2, 1]) == pytest.approx(-1)
    # ties: ranks 1 2.5 2.5 4 against 1 2 3 4: covariance 4.5 over sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [7, 7, 7])])
def test_spearman_is_undefined_for_constants(a: list[float], b: list[float]):
    assert spearman(a, b) is None


def test_spearman_refuses_unequal_lists():
    with pytest.raises(ValueError, match="3 values against 2"):
        spearman([1, 2, 3], [1, 2])


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=2))
def test_spearman_looks_at_order_alone(pairs: list[tuple[int, int]]):
    a, b = zip(*pairs, strict=True)
    value = spearman(a, b)
    if value is None:
        assert 1 in (len(set(a)), len(set(b)))
    else:
        assert -1 - 1e-9 <= value <= 1 + 1e-9
        assert spearman([x**3 for x in a], b) == pytest.approx(value)
        assert spearman([-x for x in a], b) == pytest.approx(-value)


def test_slope_by_hand():
    assert least_squares_slope([1, 2, 3], [12, 14, 16]) == pytest.approx(2)  # an intercept is allowed for
    assert least_squares_slope([5, 5], [1, 2]) is None
    assert least_squares_slope([5], [1]) is None


def test_pairing_removes_the_difficulty_of_the_questions():
    hard = [0.0, 1.0] * 100
    better = [x + 0.1 for x in hard]
    result = paired_difference(better, hard)
    assert result["mean"] == pytest.approx(0.1)
    assert (result["lo"], result["hi"]) == pytest.approx((0.1, 0.1))


def test_a_paired_interval_covers_the_difference():
    a, b = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50
    result = paired_difference(a, b, seed=3)
    assert result["mean"] == pytest.approx(0.1)
    # the difference is 1 in a tenth of the pairs: 1.96 * sqrt(0.1 * 0.9 / 100) is 0.059
    assert (result["lo"], result["hi"]) == pytest.approx((0.041, 0.159), abs=0.02)
    assert result == paired_difference(a, b, seed=3)
    assert paired_difference(b, a)["mean"] == pytest.approx(-0.1)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_a_paired_difference_needs_pairs(a: list[float], b: list[float]):
    with pytest.raises(InputError, match="same questions"):
        paired_difference(a, b)


def test_compression():
    assert compression(162, 33) == pytest.approx(0.7963, abs=1e-4)
    assert compression(100, 150) == -0.5
    with pytest.raises(InputError, match="0 tokens"):
        compression(0, 10)
