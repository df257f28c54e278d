"""The rivals' formulas by golden values worked out by hand, and what must hold of each."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rival_rewards import arora_zanette, hard_cap, kimi, l1_exact, l1_max

from sbtiny.errors import InputError

lengths = st.integers(0, 20_000)
groups = st.lists(st.tuples(lengths, st.booleans()), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("length", "correct", "exact", "most"),
    [
        (1000, True, 1.0, 0.5),
        (0, True, 0.7, 0.8),
        (2000, True, 0.7, 0.2),
        (3000, True, 0.4, 0.0),  # 0.5 - 0.6 is clipped
        (1000, False, 0.0, 0.0),
        (2000, False, -0.3, 0.0),
    ],
)
def test_l1_golden(length: int, correct: bool, exact: float, most: float) -> None:
    assert l1_exact(length, correct, target=1000) == pytest.approx(exact)
    assert l1_max(length, correct, target=1000) == pytest.approx(most)


def test_arora_zanette_golden() -> None:
    """Correct lengths 100 and 300: mean 200, standard deviation 100; the wrong answer's length plays no part."""
    sigmoid = 1 / (1 + math.exp(-1))
    found = arora_zanette([100, 300, 9000], [True, True, False], alpha=0.4)
    assert found == pytest.approx([1 - 0.4 * (1 - sigmoid), 1 - 0.4 * sigmoid, 0.0])
    assert arora_zanette([100, 100, 7], [True, True, False], alpha=0.4) == pytest.approx([0.8, 0.8, 0.0])
    assert arora_zanette([5, 6], [False, False]) == [0.0, 0.0]


def test_kimi_golden() -> None:
    found = kimi([100, 200, 300, 100, 300], [True, True, True, False, False])
    assert found == pytest.approx([1.5, 1.0, 0.5, 0.0, -0.5])
    assert kimi([100, 300], [True, False], weight=0.2) == pytest.approx([1.1, -0.1])
    assert kimi([70, 70], [True, False]) == [1.0, 0.0]


def test_hard_cap_golden() -> None:
    assert [hard_cap(n, c, limit=50) for n, c in ((50, True), (51, True), (10, False))] == [1.0, 0.0, 0.0]


def test_a_verdict_for_every_length() -> None:
    for reward in (arora_zanette, kimi):
        assert reward([], []) == []
        with pytest.raises(InputError, match="2 lengths and 1 verdicts"):
            reward([1, 2], [True])


@given(lengths, lengths, lengths, st.booleans())
def test_l1_exact_pays_for_nearness_and_l1_max_for_brevity(one: int, other: int, target: int, correct: bool) -> None:
    near, far = sorted((one, other), key=lambda n: abs(target - n))
    assert l1_exact(near, correct, target) >= l1_exact(far, correct, target)
    short, long = sorted((one, other))
    assert 1 >= l1_max(short, correct, target) >= l1_max(long, correct, target) >= 0


@given(groups, st.floats(0, 0.99))
def test_arora_zanette_never_pays_a_wrong_answer_nor_makes_a_right_one_worse_than_it(group: list[tuple[int, bool]], alpha: float) -> None:
    rewards = arora_zanette(*map(list, zip(*group, strict=True)), alpha=alpha)
    for (_, correct), reward in zip(group, rewards, strict=True):
        assert (1 - alpha - 1e-9 <= reward <= 1) if correct else reward == 0


@given(groups)
def test_kimi_lies_within_its_bounds(group: list[tuple[int, bool]]) -> None:
    for (_, correct), reward in zip(group, kimi(*map(list, zip(*group, strict=True))), strict=True):
        assert (0.5 <= reward <= 1.5) if correct else (-0.5 <= reward <= 0)


@given(groups)
def test_shorter_is_never_worse_among_answers_of_one_question(group: list[tuple[int, bool]]) -> None:
    sizes, correct = map(list, zip(*group, strict=True))
    for rewards in (arora_zanette(sizes, correct), kimi(sizes, correct), [hard_cap(n, c, 100) for n, c in group]):
        right = sorted((n, -r) for n, r, c in zip(sizes, rewards, correct, strict=True) if c)
        assert [-r for _, r in right] == sorted((-r for _, r in right), reverse=True)
