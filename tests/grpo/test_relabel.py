"""Relabelling changes the budget alone, and to the one that earns most."""

import pytest

from sbtiny.budget.protocol import render_budget
from sbtiny.budget.reward import RewardConfig, compute_reward
from sbtiny.grpo.relabel import best_budget, relabel_budget
from sbtiny.rollout.episode import Episode, read_episode
from sbtiny.tasks import arithmetic

QUESTION = arithmetic.generate_questions("train", 1, seed=3)[0].question
BODY = "a)+1=2\n\\boxed{2}"


def episode(policy, tag: str, budget: int | None = None) -> Episode:
    """A finished answer as the engine would return it, after a stated `tag` or a given budget."""
    ids = [*policy.encode(tag), *policy.encode(BODY), *policy.encode("</solution>"), policy.tokenizer.eos_token_id]
    return read_episode(policy.request(QUESTION, 200, 1, budget), ids, policy.engine.pieces, "end")


@pytest.mark.parametrize("centre", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 2, 9, 33, 100, 4096])
def test_the_best_budget_earns_most_at_the_tightest_window(length: int, centre: float):
    def earned(budget: int) -> float:
        config = RewardConfig(reward_peak=centre)
        return compute_reward(budget=budget, length=length, correct=True, b_max=float("inf"), alpha=0.1, config=config).total

    best = max(range(1, 2 * length + 2), key=earned)
    assert earned(best_budget(length, 0.1, centre)) >= earned(best) - 0.06  # whole numbers: one more may be a little better
    assert best_budget(length, 0.1, 1.0) == length


def test_relabelling_changes_the_budget_and_nothing_else(policy):
    old = episode(policy, render_budget(321))
    new = relabel_budget(policy, old, 12)
    assert (old.budget, new.budget) == (321, 12)
    assert old.length == new.length == len(policy.encode(BODY))
    assert new.completion_ids == episode(policy, render_budget(12)).completion_ids
    assert (new.request, new.stop_reason) == (old.request, "end")


def test_a_token_that_ends_the_tag_and_begins_the_body_loses_nothing(policy) -> None:
    joined = next(i for i, piece in enumerate(policy.engine.pieces) if piece == ">a")
    old = episode(policy, render_budget(321))
    tag = policy.encode(render_budget(321))
    assert policy.engine.pieces[tag[-1]] == ">"
    rest = policy.encode(BODY[1:] + "</solution>")
    old = read_episode(old.request, [*tag[:-1], joined, *rest, policy.tokenizer.eos_token_id], policy.engine.pieces, "end")
    assert (old.solution, relabel_budget(policy, old, 12).solution) == (BODY, BODY)


def test_a_given_budget_is_changed_in_the_prompt(policy):
    old = episode(policy, "", budget=321)
    new = relabel_budget(policy, old, 12)
    assert new.completion_ids == old.completion_ids
    assert new.request.prompt_ids == policy.request(QUESTION, 200, 1, 12).prompt_ids
    assert (new.budget, new.source, new.length) == (12, "user", old.length)
