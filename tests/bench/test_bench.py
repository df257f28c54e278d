"""Both benches on the bundled model: the same tokens on every side, the same loss; no figure is asserted, machines differ."""

import json

import pytest
from typer.testing import CliRunner

from sbtiny.bench import grpo, rollout
from sbtiny.cli import app


def test_rollout_compares_all_engines(tiny) -> None:
    model, tokenizer = tiny
    attention = model.config._attn_implementation
    work = rollout.job(tokenizer, [3, 20, 5, 4, 6, 2], slots=4, group=2, seed=0)
    assert work.prompts[0] == work.prompts[1] != work.prompts[2]
    result = rollout.compare(model, tokenizer, work, ("ours", "generate", "continuous"), rounds=1)
    assert set(result["engines"]) == {"ours", "generate", "continuous"}
    assert {"ratio_generate", "ratio_continuous", "machine"} < set(result)
    assert model.config._attn_implementation == attention
    json.dumps(result)


def test_our_engine_keeps_to_the_memory_it_is_given() -> None:
    result = CliRunner().invoke(app, ["bench", "rollout", "--engine", "ours", "--kv-memory", "0.00001"])
    assert "raise --kv-memory" in str(result.exception)


def test_grpo_gives_the_loss_of_plain_trl() -> None:
    plan = grpo.Plan("tiny", "float32", False, 2, 4, 4, [3, 30, 5, 4, 6, 2, 9, 8], steps=1, seed=0, rank=4)
    result = grpo.compare(plan, rounds=1)
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
