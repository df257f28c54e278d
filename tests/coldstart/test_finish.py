"""Cut groups through TRL: injected tokens and those before them are not trained, and right answers earn."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sbtiny.budget.protocol import SOLUTION
from sbtiny.cli import main as cli
from sbtiny.grpo import trainer as grpo
from sbtiny.models.load import load_tokenizer

SMALL = (
    "grpo.user_share=0 grpo.prompts_per_step=2 grpo.num_generations=4 grpo.micro_batch=4 "
    "grpo.max_tokens=60 grpo.sample_steps=1 grpo.learning_rate=1e-3"
)


@pytest.fixture
def batches(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches of the loss in three steps of `sbtiny grpo --cut-share 1`."""
    seen: list[dict[str, Any]] = []
    trimmed = grpo.trim_padding
    monkeypatch.setattr(grpo, "trim_padding", lambda inputs: seen.append(trimmed(inputs)) or seen[-1])
    changed = [word for item in SMALL.split() for word in ("--set", item)]
    command = ["sbtiny", "grpo", "--run", str(started), "--cut-share", "1", "--steps", "3", "--limit", "12", "--output", "run", "--force"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command, *changed])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    return seen


def test_only_what_follows_the_wrap_up_is_trained_and_right_answers_earn(batches: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    wrap_up = tokenizer.encode(SOLUTION.wrap_up, add_special_tokens=False)
    cut = 0
    for batch in batches:
        for ids, real, mask in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True):
            completion, mask = ids[: real.sum()].tolist(), mask[: real.sum()].tolist()
            ends = [i + len(wrap_up) for i in range(len(completion)) if completion[i : i + len(wrap_up)] == wrap_up]
            first = ends[-1] if ends else 0
            assert mask == [0] * first + [1] * (len(completion) - first)
            assert len(completion) > first  # something is left to train on
            cut += bool(ends)
    assert cut > sum(len(batch["completion_ids"]) for batch in batches) / 3  # not those without a stated budget
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in samples} <= {1.0, 0.0, -1.0}
    assert all(row["reward"] == row["correct"] for row in samples if row["reward"] >= 0)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("cut_accuracy" in row for row in metrics[:3])  # a group without a stated budget is not cut
    assert (tmp_path / "run" / "adapter").is_dir()
