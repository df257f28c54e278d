"""Shares are kept, and given budgets lie around the stated one."""

import math
import random
from collections import Counter

import pytest

from sbtiny.config import GrpoSettings
from sbtiny.grpo.groups import SELF_GROUP, draw_group_types, make_group

G = GrpoSettings(user_share=0.3, cut_share=0.2, user_low=0.5, user_high=4.0)


def test_kinds_keep_their_shares():
    drawn = Counter(draw_group_types(20_000, G, random.Random(0)))
    assert drawn["user"] / 20_000 == pytest.approx(0.3, abs=0.02)
    assert drawn["cut"] / 20_000 == pytest.approx(0.2, abs=0.02)


def test_given_budgets_lie_on_both_sides_of_the_stated_one():
    drawn = [make_group("user", 100, math.inf, G, random.Random(i)).budget for i in range(2000)]
    assert min(drawn) >= 50
    assert max(drawn) <= 400
    assert 0.2 < sum(b < 100 for b in drawn) / 2000 < 0.45  # evenly in the logarithm: a third of 0.5x to 4x lies below 1x


def test_b_max_bounds_a_given_budget():
    assert max(make_group("user", 100, 250, G, random.Random(i)).budget for i in range(500)) <= 250
    assert max(make_group("user", 100, 60, G, random.Random(i)).budget for i in range(500)) > 150  # but twice the stated budget is allowed


def test_no_given_budget_is_longer_than_an_answer_may_be():
    assert max(make_group("user", 500, math.inf, G, random.Random(i)).budget for i in range(500)) <= G.max_tokens
    assert make_group("user", 600_000, math.inf, G, random.Random(0)).budget == G.max_tokens


def test_a_cut_group_keeps_its_stated_budget_and_stops_below_it():
    drawn = [make_group("cut", 100, 60, G, random.Random(i)) for i in range(500)]
    assert {group.budget for group in drawn} == {100}
    assert min(g.ceiling for g in drawn) >= 12
    assert max(g.ceiling for g in drawn) < 60


@pytest.mark.parametrize("kind", ["self", "user", "cut"])
def test_without_a_stated_budget_a_group_is_a_self_budget_group(kind: str):
    assert make_group(kind, None, 60, G, random.Random(0)) == SELF_GROUP
