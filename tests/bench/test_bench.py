"""Both benches on the bundled model: the same tokens on every side, the same loss; no figure is asserted, machines differ."""

import json
import re

import pytest
from typer.testing import CliRunner

from sbtiny.bench import grpo, rollout
from sbtiny.cli import bench as benching
from sbtiny.cli.main import app


def test_rollout_compares_all_engines(tiny) -> None:
    model, tokenizer = tiny
    attention = model.config._attn_implementation
    work = rollout.build_job(tokenizer, [3, 20, 5, 4, 6, 2], slots=4, group=2, seed=0)
    assert work.prompts[0] == work.prompts[1] != work.prompts[2]
    result = rollout.compare_engines(model, tokenizer, [(work, 1)], ("ours", "generate", "continuous"))
    assert set(result["engines"]) == {"ours", "generate", "continuous"}
    assert {"ratio_generate", "ratio_continuous", "machine"} < set(result)
    assert model.config._attn_implementation == attention
    json.dumps(result)


def test_each_round_and_engine_is_told_as_it_runs_with_the_time_left(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny
    work = rollout.build_job(tokenizer, [3, 20, 5, 4], slots=2, group=2, seed=0)
    assert rollout.compare_engines(model, tokenizer, [(work, 2)], ("ours", "generate"))["rounds"] == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert re.fullmatch(r"rounds: 2 of 4 requests, about \d+ s", told[0])
    assert [line.partition(":")[0] for line in told[1:]] == [f"round {n} of 2, {name}" for n in (1, 2) for name in ("ours", "generate")]
    assert all(re.search(r": \d+ tok/s, \d+ s left$", line) for line in told[1:])


def job_of(requests: int, slots: int = 32) -> rollout.BenchJob:
    return rollout.BenchJob([[1]] * requests, [10] * (requests - 1) + [40], slots, seed=0)


def test_work_is_foreseen_from_a_first_look() -> None:
    assert rollout.EngineTimeEstimate("ours", 2.0, 0.5).expected(job_of(128)) == 4 * 2.0 + 0.5 * 41  # 1,310 tokens in 32 slots
    assert rollout.EngineTimeEstimate("generate", 2.0, 0.5).expected(job_of(128)) == 4 * 2.0 + 0.5 * (10 + 10 + 10 + 40)
    assert rollout.EngineTimeEstimate("ours", 0.0, 1.0).expected(job_of(2)) == 40  # the longest answer alone


def test_work_of_our_own_choosing_is_as_much_as_five_minutes_allow(capsys: pytest.CaptureFixture[str]) -> None:
    choices = [(job_of(count), times) for count, times in benching.list_candidate_sizes(None, None)]
    for a_pass, chosen in ((0.1, (128, 3)), (3.0, (128, 2)), (3.7, (64, 2)), (9.0, (32, 1))):
        work, rounds = rollout.choose_job(choices, {"ours": rollout.EngineTimeEstimate("ours", 0.0, a_pass)})
        assert (len(work.lengths), rounds) == chosen
        assert capsys.readouterr().err.count("--requests") == (chosen != (128, 3))


def test_what_the_user_asked_for_is_never_changed() -> None:
    assert benching.list_candidate_sizes(None, None)[0] == (128, 3)
    assert benching.list_candidate_sizes(500, 7) == [(500, 7)]
    assert {requests for requests, _ in benching.list_candidate_sizes(500, None)} == {500}
    assert {rounds for _, rounds in benching.list_candidate_sizes(None, 7)} == {7}
    work, rounds = rollout.choose_job([(job_of(500), 7)], {"ours": rollout.EngineTimeEstimate("ours", 0.0, 99.0)})
    assert (len(work.lengths), rounds) == (500, 7)


def test_our_engine_keeps_to_the_memory_it_is_given() -> None:
    result = CliRunner().invoke(app, ["bench", "rollout", "--engine", "ours", "--kv-memory", "0.00001"])
    assert "raise --kv-memory" in str(result.exception)


def test_grpo_gives_the_loss_of_plain_trl() -> None:
    plan = grpo.BenchConfig("tiny", "float32", False, 2, 4, 4, [3, 30, 5, 4, 6, 2, 9, 8], steps=1, seed=0, rank=4)
    result = grpo.compare_trainers(plan, rounds=1)
    assert result["loss"] != 0
    assert result["loss_difference"] < 1e-5
    json.dumps(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rollout", "--engine", "ours,fast"], "'fast'"),
        (["rollout", "--dtype", "int8"], "int8"),
        (["rollout", "--mean", "100"], "heavy tail"),
        (["grpo", "--micro-batch", "7"], "divide"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert said in str(result.exception)
