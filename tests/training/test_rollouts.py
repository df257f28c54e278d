"""What a GRPO step asks for, what answers earn, and that retelling changes the number alone."""

import math
import types
from pathlib import Path

import pytest

from sbtiny.budget.protocol import prefill
from sbtiny.config import GrpoSettings, Settings
from sbtiny.rollout.episode import read_episode
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto
from sbtiny.training.rollouts import Rollouts, alpha_at, needed, retold, summary

QUESTIONS = arithmetic.questions("train", 8, seed=3)


def episode(policy, question, number: str, body: str, budget: int | None = None):
    """A finished answer as the engine would return it; `budget` prefilled or the `number` written by the model."""
    request = policy.request(question.question, 200, seed=1, budget=budget)
    said = [] if budget else policy.encode(f"<budget>{number}</budget><solution>")
    ids = [*said, *policy.encode(body), *policy.encode("</solution>"), policy.tokenizer.eos_token_id]
    return read_episode(request, ids, policy.engine.pieces, "end")


@pytest.fixture
def rollouts(policy, tmp_path: Path) -> Rollouts:
    settings = Settings(grpo=GrpoSettings(prompts=2, group=4, hindsight=1, micro_batch=8, max_tokens=60))
    return Rollouts(policy, QUESTIONS, auto, {q.id: 500.0 for q in QUESTIONS}, settings, tmp_path)


def test_alpha_falls_to_the_end_and_rests_there():
    g = GrpoSettings(steps=100, alpha_hold=0.4)
    assert alpha_at(0, g) == 6.0
    assert alpha_at(30, g) == pytest.approx(3.05)
    assert alpha_at(60, g) == alpha_at(99, g) == pytest.approx(0.1)
    assert alpha_at(99, GrpoSettings(steps=100, alpha_hold=0.0)) == pytest.approx(6 - 5.9 * 0.99)


@pytest.mark.parametrize("length", [1, 2, 9, 33, 100, 4096])
def test_the_needed_budget_is_where_the_reward_peaks_at_the_tightest_window(length: int):
    assert needed(length, 0.1, centre=1) == length
    b = needed(length, 0.1, centre=0)
    assert (b - length) / b <= 0.1
    assert (b + 1 - length) / (b + 1) > 0.1


def test_retelling_changes_the_number_and_nothing_else(policy):
    question = QUESTIONS[0]
    old = episode(policy, question, "321", "a)+1=2\n\\boxed{2}")
    new = retold(policy, old, 12)
    body = policy.encode("a)+1=2\n\\boxed{2}")
    assert (old.budget, new.budget) == (321, 12)
    assert old.length == new.length == len(body)
    assert new.completion_ids == [
        *policy.encode(prefill(12)),
        *old.completion_ids[-len(body) - len(policy.encode("</solution>")) - 1 :],
    ]
    assert new.stop_reason == "end"


def test_the_shortest_correct_answer_is_retold_when_it_missed(policy, rollouts):
    question = QUESTIONS[0]
    right, wrong = f"\\boxed{{{question.answer}}}", "\\boxed{-1}"
    longer = episode(policy, question, "400", f"a)+1=2\n{right}")
    short = episode(policy, question, "300", right)
    bad = episode(policy, question, "900", wrong)
    scored = [rollouts._score(question, e, 0.5) for e in (longer, short, bad)]
    rollouts.metrics = {"alpha": 0.5}
    rollouts._retell(scored, range(3))
    assert [s.retold for s in scored] == [False, True, False]
    assert scored[1].episode.budget == needed(short.length, 0.1, rollouts.g.centre)
    assert scored[1].reward.total > scored[0].reward.total


def test_nothing_is_retold_when_the_shortest_correct_answer_kept_its_number(policy, rollouts):
    question = QUESTIONS[0]
    right = f"\\boxed{{{question.answer}}}"
    longer = episode(policy, question, "400", f"a)+1=2\n{right}")
    close = episode(policy, question, str(needed(len(policy.encode(right)), 0.1, rollouts.g.centre)), right)
    scored = [rollouts._score(question, e, 0.5) for e in (longer, close)]
    rollouts.metrics = {"alpha": 0.5}
    rollouts._retell(scored, range(2))
    assert not any(s.retold for s in scored)


def test_a_budget_of_the_user_is_scored_without_b_max_and_in_a_narrow_window(policy, rollouts):
    question = QUESTIONS[0]
    right = f"\\boxed{{{question.answer}}}"
    rollouts.b_max[question.id] = 1.0
    own = rollouts._score(question, episode(policy, question, "300", right), 6.0)
    given = rollouts._score(question, episode(policy, question, "", right, budget=300), 6.0)
    assert own.reward.budget_penalty == -0.4
    assert given.reward.budget_penalty == 0.0
    assert own.reward.inside
    assert not given.reward.inside


def test_an_unfinished_answer_is_malformed(policy, rollouts):
    e = episode(policy, QUESTIONS[0], "300", "\\boxed{1}")
    e.stop_reason = "length"
    assert rollouts._score(QUESTIONS[0], e, 6.0).reward.total == -1


def test_a_step_returns_what_trl_needs_and_repeats_itself(rollouts):
    prompts = [q.id for q in QUESTIONS[:2] for _ in range(4)]
    trainer = types.SimpleNamespace(state=types.SimpleNamespace(global_step=5))
    first, again = rollouts(prompts, trainer), rollouts(prompts, trainer)
    assert first == again
    assert {len(v) for v in first.values() if v is not None} == {8}
    assert all(-1 <= r <= 1 for r in first["reward"])
    assert rollouts.metrics["malformed"] > 0.9  # the bundled model knows no budgets yet
    trainer.state.global_step = 6
    assert rollouts(prompts, trainer)["completion_ids"] != first["completion_ids"]


def test_user_share_prefills_whole_groups(policy, tmp_path: Path):
    settings = Settings(grpo=GrpoSettings(prompts=2, group=4, user_share=1.0, micro_batch=8, max_tokens=60))
    rollouts = Rollouts(policy, QUESTIONS, auto, {q.id: math.inf for q in QUESTIONS}, settings, tmp_path)
    rollouts._own_budgets = lambda questions, seed: [50, None]
    requests = rollouts._requests([q for q in QUESTIONS[:2] for _ in range(4)], step=0)
    assert len({r.prefill for r in requests[:4]}) == 1
    assert requests[0].prefill.startswith("<budget>")
    assert {r.prefill for r in requests[4:]} == {""}  # no number of its own to start from
    assert len({r.seed for r in requests}) == 8


def test_summary_counts_malformed_as_not_within(policy, rollouts):
    question = QUESTIONS[0]
    scored = [
        rollouts._score(question, episode(policy, question, "5", f"\\boxed{{{question.answer}}}"), 1.0),
        rollouts._score(question, episode(policy, question, "five", "x"), 1.0),
    ]
    s = summary(scored, 1.0, 2.0)
    assert s["malformed"] == 0.5
    assert s["within_50"] == 0.5
    assert s["accuracy"] == 0.5
    assert s["budget"] == 5
