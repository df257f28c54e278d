"""Shares are kept, and a user's numbers lie around the model's own."""

import math
import random
from collections import Counter

import pytest

from sbtiny.config import GrpoSettings
from sbtiny.grpo.groups import SELF, deal, kinds, spread

G = GrpoSettings(user_share=0.3, cut_share=0.2, user_low=0.5, user_high=4.0)


def test_kinds_keep_their_shares():
    drawn = Counter(kinds(20_000, G, random.Random(0)))
    assert drawn["user"] / 20_000 == pytest.approx(0.3, abs=0.02)
    assert drawn["cut"] / 20_000 == pytest.approx(0.2, abs=0.02)


def test_numbers_of_a_user_lie_on_both_sides_of_the_models_own():
    drawn = [deal("user", 100, math.inf, G, random.Random(i)).budget for i in range(2000)]
    assert min(drawn) >= 50
    assert max(drawn) <= 400
    assert 0.2 < sum(b < 100 for b in drawn) / 2000 < 0.45  # evenly in the logarithm: a third of 0.5x to 4x lies below 1x


def test_what_the_initial_model_wrote_bounds_a_users_number():
    assert max(deal("user", 100, 250, G, random.Random(i)).budget for i in range(500)) <= 250
    assert max(deal("user", 100, 60, G, random.Random(i)).budget for i in range(500)) > 150  # but twice its own may be asked


def test_a_cut_group_keeps_its_own_number_and_stops_below_it():
    drawn = [deal("cut", 100, 60, G, random.Random(i)) for i in range(500)]
    assert {group.budget for group in drawn} == {100}
    assert min(g.ceiling for g in drawn) >= 12
    assert max(g.ceiling for g in drawn) < 60


@pytest.mark.parametrize("kind", ["self", "user", "cut"])
def test_without_a_number_of_its_own_a_group_is_self_set(kind: str):
    assert deal(kind, None, 60, G, random.Random(0)) == SELF


def test_spread():
    assert spread([0.5, 0.5]) == 0
    assert spread([-1, 0.5, 0]) == 1.5
