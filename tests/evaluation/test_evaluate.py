"""The budget that is prefilled for each question."""

import pytest

from sbtiny.budget.metrics import summarise
from sbtiny.budget.protocol import MAX_BUDGET, BudgetChoice, parse_budget_option, render_budget
from sbtiny.evaluation import evaluate
from sbtiny.evaluation.evaluate import given_budgets, score_answer
from sbtiny.rollout.episode import Sampling, read_episode
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto

ASKED = arithmetic.generate_questions("val", 4)
GREEDY = Sampling(temperature=0.0)


def test_the_stated_budget_is_left_to_the_model(policy: Policy) -> None:
    assert given_budgets(policy, ASKED, BudgetChoice("auto"), GREEDY, seed=0) == [None] * 4


def test_a_fixed_budget_is_the_same_for_every_question(policy: Policy) -> None:
    assert given_budgets(policy, ASKED, BudgetChoice("fixed", 120.0), GREEDY, seed=0) == [120] * 4


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("0.5x", [20, 500_000, None, 1]),
        ("4x", [160, MAX_BUDGET, None, 4]),
        ("9999999x", [MAX_BUDGET, MAX_BUDGET, None, MAX_BUDGET]),
        ("0.000000001x", [1, 1, None, 1]),
    ],
)
def test_a_scaled_budget_stays_within_what_can_be_stated(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, option: str, given: list[int | None]
) -> None:
    monkeypatch.setattr(evaluate, "stated_budgets", lambda *_: [40, MAX_BUDGET, None, 1])
    found = given_budgets(policy, ASKED, parse_budget_option(option), GREEDY, seed=0)
    assert found == given
    assert all(render_budget(budget) for budget in found if budget is not None)


def test_an_answer_that_was_cut_is_over_the_budget_that_it_stated(policy: Policy) -> None:
    ids = policy.encode("<budget>5</budget><solution>1 and 2 and 3 and 4 and 5 and so on")
    cut = read_episode(policy.request(ASKED[0].question, len(ids), seed=0), ids, policy.engine.pieces, "length")
    sample = score_answer(ASKED[0], cut, auto)
    assert (sample.ok, sample.budget) == (False, 5)
    assert summarise([sample])["over_budget_rate"] == 1.0
