"""Requests of a GRPO step, the rewards of its answers, and which of them are relabelled."""

import contextlib
import math
import random
import types
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.budget.protocol import BudgetChoice, render_budget
from sbtiny.config import EvalSettings, GrpoSettings, Settings
from sbtiny.errors import InputError
from sbtiny.evaluation.evaluate import evaluate
from sbtiny.grpo.groups import Group, GroupAnswer, step_metrics
from sbtiny.grpo.relabel import best_budget
from sbtiny.grpo.rollouts import Rollouts, alpha_at_step, mask_through_last_injected, sample_b_max
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.episode import Sampling, read_episode
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto

QUESTIONS = arithmetic.generate_questions("train", 8, seed=3)


def episode(policy, question, stated: str, body: str, budget: int | None = None):
    """A finished answer as the engine would return it; `budget` is prefilled or `stated` is written by the model."""
    request = policy.request(question.question, 200, seed=1, budget=budget)
    tag = [] if budget else policy.encode(f"<budget>{stated}</budget><solution>")
    ids = [*tag, *policy.encode(body), *policy.encode("</solution>"), policy.tokenizer.eos_token_id]
    return read_episode(request, ids, policy.engine.pieces, "end")


def score(rollouts: Rollouts, question, episodes: list, alpha: float, kind: str) -> list[GroupAnswer]:
    """The episodes as a rewarded group."""
    group = [GroupAnswer(question, Group(kind), e) for e in episodes]
    rollouts.score_answers([group], alpha)
    return group


@pytest.fixture
def rollouts(policy, tmp_path: Path) -> Rollouts:
    settings = Settings(grpo=GrpoSettings(prompts_per_step=2, num_generations=4, relabel_per_group=1, micro_batch=8, max_tokens=60))
    return Rollouts(policy, QUESTIONS, auto, {q.id: 500.0 for q in QUESTIONS}, settings, tmp_path)


def test_alpha_falls_to_the_end_and_rests_there():
    g = GrpoSettings(steps=100, alpha_hold=0.4)
    assert alpha_at_step(0, g) == 6.0
    assert alpha_at_step(30, g) == pytest.approx(3.05)
    assert alpha_at_step(60, g) == alpha_at_step(99, g) == pytest.approx(0.1)
    assert alpha_at_step(99, GrpoSettings(steps=100, alpha_hold=0.0)) == pytest.approx(6 - 5.9 * 0.99)


def test_the_shortest_correct_answer_is_relabelled_when_it_missed(policy, rollouts):
    question = QUESTIONS[0]
    right, wrong = f"\\boxed{{{question.answer}}}", "\\boxed{-1}"
    longer = episode(policy, question, "400", f"a)+1=2\n{right}")
    short = episode(policy, question, "300", right)
    bad = episode(policy, question, "900", wrong)
    scored = score(rollouts, question, [longer, short, bad], 0.5, "self")
    rollouts.relabel(scored, 0.5)
    assert [s.relabelled for s in scored] == [False, True, False]
    assert scored[1].episode.budget == best_budget(short.length, 0.1, rollouts.g.reward_peak)
    assert scored[1].reward.total > scored[0].reward.total


def test_nothing_is_relabelled_when_the_shortest_correct_answer_kept_its_budget(policy, rollouts):
    question = QUESTIONS[0]
    right = f"\\boxed{{{question.answer}}}"
    longer = episode(policy, question, "400", f"a)+1=2\n{right}")
    close = episode(policy, question, str(best_budget(len(policy.encode(right)), 0.1, rollouts.g.reward_peak)), right)
    scored = score(rollouts, question, [longer, close], 0.5, "self")
    rollouts.relabel(scored, 0.5)
    assert not any(s.relabelled for s in scored)


def test_a_budget_of_the_user_is_scored_without_b_max_and_in_a_narrow_window(policy, rollouts):
    question = QUESTIONS[0]
    right = f"\\boxed{{{question.answer}}}"
    rollouts.b_max[question.id] = 1.0
    (own,) = score(rollouts, question, [episode(policy, question, "300", right)], 6.0, "self")
    (given,) = score(rollouts, question, [episode(policy, question, "", right, budget=300)], 6.0, "user")
    assert own.reward.budget_penalty == -0.4
    assert given.reward.budget_penalty == 0.0
    assert own.reward.inside
    assert not given.reward.inside


def test_an_unfinished_answer_is_malformed(policy, rollouts):
    e = episode(policy, QUESTIONS[0], "300", "\\boxed{1}")
    e.stop_reason, e.ended = "length", False
    assert [score(rollouts, QUESTIONS[0], [e], 6.0, kind)[0].reward.total for kind in ("self", "user", "cut")] == [-1, -1, -1]


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
    settings = Settings(grpo=GrpoSettings(prompts_per_step=2, num_generations=4, user_share=1.0, micro_batch=8, max_tokens=60))
    rollouts = Rollouts(policy, QUESTIONS, auto, {q.id: math.inf for q in QUESTIONS}, settings, tmp_path)
    rollouts._sample_stated_budgets = lambda questions, seed: [50, None]
    given, own = rollouts.assign_budgets(QUESTIONS[:2], ["user", "user"], random.Random(0))
    assert (given.kind, own) == ("user", Group("self"))  # without a stated budget there is nothing to draw one around
    assert rollouts.request(QUESTIONS[0], given, 7).prefill == render_budget(given.budget)
    assert rollouts.request(QUESTIONS[1], own, 8).prefill == ""


def test_a_system_turn_stands_in_every_prompt(policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = Settings(grpo=GrpoSettings(prompts_per_step=1, num_generations=4, user_share=1.0, micro_batch=8, max_tokens=60))
    question = replace(QUESTIONS[0], system="In French.")
    rollouts, met = Rollouts(policy, [question], auto, {question.id: math.inf}, settings, tmp_path), []

    def sample(requests, *_):
        met.extend(requests)
        return [read_episode(r, [policy.tokenizer.eos_token_id], policy.engine.pieces, "end") for r in requests]

    monkeypatch.setattr(policy, "sample", sample)
    monkeypatch.setattr(policy.model, "disable_adapter", contextlib.nullcontext, raising=False)
    sample_b_max(policy, [question], auto, settings)
    (group,) = rollouts.assign_budgets([question], ["user"], random.Random(0))
    met.append(rollouts.request(question, group, 7))
    evaluate(policy, [question], auto, BudgetChoice("scaled", 2.0), EvalSettings(), 0)
    prompt = tuple(prompt_ids(policy.tokenizer, question.question, "In French."))
    assert len(met) == 5
    assert [request.prompt_ids[: len(prompt)] for request in met] == [prompt] * 5


def test_a_cut_answer_learns_only_what_follows_the_wrap_up(policy, tmp_path: Path):
    settings = Settings(grpo=GrpoSettings(prompts_per_step=2, num_generations=4, user_share=0, cut_share=1.0, micro_batch=8, max_tokens=90))
    rollouts = Rollouts(policy, QUESTIONS, auto, {q.id: math.inf for q in QUESTIONS}, settings, tmp_path)
    request = rollouts.request(QUESTIONS[0], Group("cut", budget=40, ceiling=6), seed=1)
    episode = policy.sample([request], Sampling())[0]
    (scored,) = score(rollouts, QUESTIONS[0], [episode], 0.5, "cut")
    injected = len(rollouts.limits(1).wrap_up)
    assert episode.stop_reason == "ceiling"
    assert episode.injected[6 : 6 + injected] == [True] * injected
    assert mask_through_last_injected(episode.injected) == [0] * (6 + injected) + [1] * (len(episode.completion_ids) - 6 - injected)
    assert scored.reward.total == (float(scored.correct) if episode.ended and episode.budget else -1)


def test_a_reserve_without_room_for_an_answer_is_told_at_the_start(policy, tmp_path: Path):
    settings = Settings(grpo=GrpoSettings(prompts_per_step=2, num_generations=4, micro_batch=8, cut_share=0.2, reserve=1))
    with pytest.raises(InputError, match="a reserve of 1 tokens leaves nothing for the answer after a wrap-up"):
        Rollouts(policy, QUESTIONS, auto, {q.id: 500.0 for q in QUESTIONS}, settings, tmp_path)


def test_summary_counts_malformed_as_not_within(policy, rollouts):
    question = QUESTIONS[0]
    episodes = [episode(policy, question, "5", f"\\boxed{{{question.answer}}}"), episode(policy, question, "five", "x")]
    s = step_metrics([score(rollouts, question, episodes, 1.0, "self")], rollouts.b_max, 1.0, 2.0)
    assert s["malformed"] == 0.5
    assert s["within_50"] == 0.5
    assert s["accuracy"] == 0.5
    assert s["budget"] == 5


def test_a_metric_without_samples_is_omitted(policy, rollouts):
    """A 0, or the mean of another kind of group, would report something that was not measured."""
    far = episode(policy, QUESTIONS[0], "", f"\\boxed{{{QUESTIONS[0].answer}}}", budget=100)
    metrics = step_metrics([score(rollouts, QUESTIONS[0], [far], 1.0, "user")], rollouts.b_max, 1.0, 2.0)
    assert metrics["user_within_50"] == 0
    assert not {"accuracy", "tokens", "budget", "within_50", "malformed", "self_reward", "cut_accuracy"} & metrics.keys()


def test_a_group_of_equal_rewards_is_resampled_with_another_question(policy, tmp_path: Path):
    settings = Settings(
        grpo=GrpoSettings(prompts_per_step=2, num_generations=4, user_share=0, micro_batch=8, max_tokens=60, resample_zero_std=True)
    )
    rollouts = Rollouts(policy, QUESTIONS, auto, {q.id: math.inf for q in QUESTIONS}, settings, tmp_path)
    prompts = [q.id for q in QUESTIONS[:2] for _ in range(4)]
    trainer = types.SimpleNamespace(state=types.SimpleNamespace(global_step=5))
    first, again = rollouts(prompts, trainer), rollouts(prompts, trainer)
    assert first == again
    own = [list(policy.request(q.question, 60, seed=1).prompt_ids) for q in QUESTIONS]
    met = [own.index(ids) for ids in first["prompt_ids"]]
    assert [met[i] for i in (0, 4)] == [met[i] for i in (3, 7)]  # whole groups; both were all malformed
    assert len({met[0], met[4]} - {0, 1}) == 2


def test_an_answer_the_initial_model_failed_may_be_bounded(policy, tmp_path: Path):
    question = QUESTIONS[0]
    e = episode(policy, question, "300", f"\\boxed{{{question.answer}}}")
    penalties = []
    for bound in (None, 200, 400):
        settings = Settings(grpo=GrpoSettings(b_max_if_failed=bound))
        rollouts = Rollouts(policy, QUESTIONS, auto, {q.id: math.inf for q in QUESTIONS}, settings, tmp_path)
        penalties.append(score(rollouts, question, [e], 6.0, "self")[0].reward.budget_penalty)
    assert penalties == [0.0, -0.4, 0.0]


def test_b_max_tightens_to_the_shortest_correct_answer_of_the_group(policy, tmp_path: Path):
    question, penalties = QUESTIONS[0], []
    right = f"\\boxed{{{question.answer}}}"
    answers = [episode(policy, question, stated, right) for stated in ("5", "14")]
    for tight in (False, True):
        settings = Settings(grpo=GrpoSettings(b_max_from_best=tight))
        rollouts = Rollouts(policy, QUESTIONS, auto, {q.id: 500.0 for q in QUESTIONS}, settings, tmp_path)
        scored = score(rollouts, question, answers, 1.0, "self")
        penalties.append([s.reward.budget_penalty for s in scored])
    assert [a.length for a in answers] == [4, 4]
    assert penalties == [[0.0, 0.0], [0.0, -0.4]]  # 14 is above 4 x (1 + alpha)


def test_a_given_budget_below_every_answer_relabels_none(policy, rollouts):
    question = QUESTIONS[0]
    right = f"\\boxed{{{question.answer}}}"
    for given, relabelled in ((2, []), (40, [0, 1])):
        scored = score(rollouts, question, [episode(policy, question, "", right, budget=given) for _ in range(3)], 0.5, "user")
        rollouts.relabel(scored, 0.5)
        assert [i for i, s in enumerate(scored) if s.relabelled] == relabelled
