"""The paper's golden values, what follows from them, and the two pieces beyond the paper."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.reward import Reward, RewardConfig, compute_reward, log_distance, preb, scheduled_alpha
from sbtiny.errors import InputError

# (correct, l / b): the totals at a = 6, 1 and 0.1 with b <= b_max
GOLDEN = {
    (True, 1.0): (0.7500, 0.7500, 0.7500),
    (True, 0.9): (0.7565, 0.7891, 1.0000),
    (True, 1.1): (0.7435, 0.7109, 0.5000),
    (True, 0.5): (0.7826, 0.9268, 0.5000),
    (True, 1.5): (0.7174, 0.5732, 0.5000),
    (False, 1.0): (-0.2500, -0.2500, -0.2500),
    (False, 0.9): (-0.2565, -0.2891, -0.5000),
    (False, 1.1): (-0.2435, -0.2109, 0.0000),
}
ROWS = [
    (correct, ratio, alpha, value)
    for (correct, ratio), values in GOLDEN.items()
    for alpha, value in zip((6.0, 1.0, 0.1), values, strict=True)
]
BEYOND = RewardConfig(outside_slope=0.1, reward_peak=1.0)

lengths = st.integers(0, 20_000)
budgets = st.integers(1, 20_000)
alphas = st.floats(0.01, 6)
limits = st.integers(1, 20_000) | st.just(math.inf)
configs = st.builds(RewardConfig, outside_slope=st.floats(0, 0.1), reward_peak=st.floats(0, 1))


@pytest.mark.parametrize("budget", [10, 1000])
@pytest.mark.parametrize(("correct", "ratio", "alpha", "value"), ROWS)
def test_golden_values(correct: bool, ratio: float, alpha: float, value: float, budget: int):
    length = round(ratio * budget)
    free = compute_reward(budget=budget, length=length, correct=correct, b_max=math.inf, alpha=alpha)
    assert round(free.total, 4) == value
    over = compute_reward(budget=budget, length=length, correct=correct, b_max=budget - 1, alpha=alpha)
    assert round(over.total, 4) == round(value - 0.4, 4)
    assert free.inside == (abs(ratio - 1) < alpha + 0.01)


def test_the_parts():
    args = {"length": 90, "correct": True, "alpha": 0.1}
    assert compute_reward(budget=100, b_max=100, **args) == Reward(1.0, 0.0, 0.0, 1.0, True)
    assert compute_reward(budget=100, b_max=99, **args) == Reward(0.6, 0.0, -0.4, 1.0, True)
    assert compute_reward(budget=None, b_max=99, **args) == Reward(-1.0, -1.0, 0.0, 0.0, False)


def test_preb_alone():
    assert preb(0, 1, length=90, budget=100, alpha=0.1, b_best=90) == 1
    assert preb(0, 1, length=110, budget=100, alpha=0.1, b_best=90) == pytest.approx(0)
    assert preb(0, 1, length=95, budget=100, alpha=0.1, b_best=90) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert preb(2, 3, length=111, budget=100, alpha=0.1, b_best=90) == 2


@pytest.mark.parametrize(("budget", "length", "alpha"), [(0, 5, 1.0), (5, -1, 1.0), (5, 5, 0.0), (5, 5, math.nan)])
def test_score_refuses_the_impossible(budget: int, length: int, alpha: float):
    with pytest.raises(ValueError, match="out of range"):
        compute_reward(budget=budget, length=length, correct=True, b_max=math.inf, alpha=alpha)


@given(budgets, alphas)
def test_meeting_the_budget_exactly_earns_three_quarters(budget: int, alpha: float):
    assert compute_reward(budget=budget, length=budget, correct=True, b_max=math.inf, alpha=alpha).total == pytest.approx(0.75)


def test_the_final_optimum_is_a_tenth_under_budget():
    def total(length: int) -> float:
        return compute_reward(budget=100, length=length, correct=True, b_max=math.inf, alpha=0.1).total

    assert max(range(300), key=total) == 90


def test_a_loose_window_pays_for_inflation():
    totals = [compute_reward(budget=b, length=50, correct=True, b_max=math.inf, alpha=6.0).total for b in (50, 100, 500, 5000)]
    assert totals == sorted(totals)
    assert totals[-1] > totals[0]


@given(configs, lengths, budgets, alphas, limits, st.booleans())
def test_bounds_and_sum(config: RewardConfig, length: int, budget: int, alpha: float, b_max: float, correct: bool):
    reward = compute_reward(budget=budget, length=length, correct=correct, b_max=b_max, alpha=alpha, config=config)
    assert -1 - 1e-9 <= reward.total <= 1
    assert reward.total == reward.format + reward.budget_penalty + reward.adherence
    assert (reward.budget_penalty < 0) == (budget > b_max)


@given(configs, lengths, budgets, lengths, budgets, alphas)
def test_correct_over_budget_is_not_below_wrong(
    config: RewardConfig, length: int, budget: int, other_length: int, other_budget: int, alpha: float
):
    right = compute_reward(budget=budget, length=length, correct=True, b_max=0, alpha=alpha, config=config)
    wrong = compute_reward(budget=other_budget, length=other_length, correct=False, b_max=math.inf, alpha=alpha, config=config)
    assert right.total >= wrong.total - 1e-9


@given(budgets, lengths, lengths, st.floats(0.05, 0.9), st.booleans())
def test_with_a_slope_further_out_is_never_better(budget: int, one: int, other: int, alpha: float, correct: bool):
    near, far = sorted((one, other), key=lambda length: log_distance(length, budget, alpha))
    totals = [compute_reward(budget=budget, length=n, correct=correct, b_max=math.inf, alpha=alpha, config=BEYOND) for n in (near, far)]
    if not totals[0].inside:
        assert totals[0].total >= totals[1].total


def test_the_slope_ends_the_dead_zone():
    def totals(config: RewardConfig) -> list[float]:
        return [compute_reward(budget=b, length=34, correct=True, b_max=math.inf, alpha=0.1, config=config).total for b in (99, 80, 60, 45)]

    assert totals(RewardConfig()) == [0.5] * 4
    sloped = totals(RewardConfig(outside_slope=0.1))
    assert sloped == sorted(sloped)
    assert len(set(sloped)) == 4


@pytest.mark.parametrize("edge", [0.9, 1.1])
def test_the_slope_begins_at_the_window(edge: float):
    assert log_distance(edge * 100, 100, 0.1) == pytest.approx(0, abs=1e-9)
    just_outside = edge * 100 + (1e-6 if edge > 1 else -1e-6)
    assert 0 < log_distance(just_outside, 100, 0.1) < 1e-7
    assert log_distance(0, 100, 0.1) == math.inf
    assert log_distance(0, 100, 1.0) == 0


@pytest.mark.parametrize("correct", [True, False])
def test_a_centred_peak_pays_most_for_meeting_the_budget(correct: bool):
    def total(length: int) -> float:
        return compute_reward(
            budget=100, length=length, correct=correct, b_max=math.inf, alpha=0.1, config=RewardConfig(reward_peak=1.0)
        ).total

    assert max(range(300), key=total) == 100
    assert total(100) == (1.0 if correct else 0.0)
    assert total(95) == pytest.approx(total(105))
    assert total(90) == pytest.approx(0.75 if correct else -0.25)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"r_b": -0.6}, "correct s_min 0.5 .* -0.6 .* wrong s_max 0.0"),
        ({"outside_slope": 0.2}, "correct s_min 0.5 .* slope 0.2 = -0.1"),
        ({"wrong": (-0.8, 0.0)}, "wrong s_min -0.8 .* = -1.2 .* r_f -1.0"),
        ({"correct": (1.0, 0.5)}, "correct: s_min 1.0 .* s_max 0.5"),
        ({"wrong": (0.0, 0.0)}, "wrong: s_min 0.0 .* s_max 0.0"),
        ({"r_b": 0.1}, "0.1 would pay"),
        ({"outside_slope": -0.1}, "-0.1 would pay"),
        ({"reward_peak": 1.5}, "1.5 is not between"),
        ({"r_f": math.nan}, "finite"),
    ],
)
def test_config_refuses_rewarding_the_worse(settings: dict, numbers: str):
    with pytest.raises(InputError, match=numbers):
        RewardConfig(**settings)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_is_exact_at_the_ends_and_clamped(schedule: str):
    found = [scheduled_alpha(step, 100, schedule=schedule) for step in (-1, 0, 100, 250)]
    assert found == [6.0, 6.0, 0.1, 0.1]


def test_alpha_in_between():
    assert scheduled_alpha(50, 100) == pytest.approx(3.05)
    assert scheduled_alpha(1, 4, start=1.0, end=0.2) == pytest.approx(0.8)
    assert scheduled_alpha(0, 0) == 0.1
    cosine = [scheduled_alpha(step, 100, schedule="cosine") for step in (25, 50, 75)]
    assert cosine == pytest.approx([0.1 + 5.9 * (1 + math.cos(math.pi * share)) / 2 for share in (0.25, 0.5, 0.75)])
    assert scheduled_alpha(25, 100) < cosine[0]
    assert scheduled_alpha(75, 100) > cosine[2]
    assert {scheduled_alpha(step, 100, schedule="fixed") for step in (0, 50, 100)} == {0.1}
