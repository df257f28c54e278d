"""An alarm stops a run that collapses, and its last good checkpoint is left to resume from."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import GRPO, easy_questions

from sbtiny import runs
from sbtiny.config import Settings
from sbtiny.errors import Failed
from sbtiny.grpo.run import run_grpo
from sbtiny.training.checkpoint import is_whole, step_of

# The rate rises from step to step: the first ones still answer, then the policy is a ruin.
# Self-budget groups alone: a step of other groups has no metric of the format.
WRONG = replace(
    GRPO,
    steps=30,
    learning_rate=0.05,
    lr_scheduler_type="constant_with_warmup",
    warmup=1.0,
    save_steps=1,
    alarm_patience=3,
    prompts_per_step=8,  # of fewer groups all may happen to have answers of equal reward, which is another alarm
    temperature=1.0,
    user_share=0.0,
)


@pytest.fixture(scope="module")
def ruin(started: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder and the message that stopped it."""
    folder = tmp_path_factory.mktemp("ruin")
    # Short questions, which `started` learnt from: of longer ones half are malformed from the first step on, which is no collapse.
    runs.write_jsonl(folder / "short.jsonl", [{"question": q.question, "answer": q.answer} for q in easy_questions()])
    with pytest.raises(Failed) as stopped:
        run_grpo(Settings(grpo=replace(WRONG, questions=str(folder / "short.jsonl"))), started, folder := folder / "run", force=True)
    return folder, str(stopped.value)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_stopped_with_its_cause_long_before_its_end(ruin: tuple[Path, str]) -> None:
    folder, message = ruin
    assert "stopped, collapse of " in message
    assert "3 steps in a row" in message
    assert "lower grpo.learning_rate" in message
    last = rows(folder)[-1]
    assert last["step"] < WRONG.steps
    assert "collapse of format" in last["alarms"]
    assert not (folder / "adapter").exists()


def test_the_last_good_checkpoint_is_kept_and_none_of_the_ruin(ruin: tuple[Path, str]) -> None:
    """Every step saves a checkpoint; the metrics of a step are of the checkpoint before it."""
    folder, message = ruin
    malformed = {row["step"]: row["malformed"] for row in rows(folder)}
    first_bad = max(malformed) - WRONG.alarm_patience + 1
    saved = sorted(step_of(path) for path in folder.glob("checkpoint-*"))
    assert len(saved) == 2
    assert saved[-1] == first_bad - 1
    good = folder / f"checkpoint-{max(step for step in saved if step <= first_bad - 2)}"  # none was saved of a bad step that passed
    assert is_whole(good)
    assert f"last good checkpoint: {good})" in message
    assert malformed[first_bad - 1] <= 0.5 < min(malformed[step] for step in range(first_bad, max(malformed) + 1))


def test_a_log_file_gets_a_line_a_step(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from sbtiny.training import monitor

    monkeypatch.setattr(monitor, "console", Console(file=sys.stderr, width=80))
    run_grpo(Settings(grpo=replace(GRPO, steps=2, save_steps=0)), started, tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grpo ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all(word in lines[0] for word in ("reward", "no spread", "malformed", "entropy", "sample+train s", "left 0:00:"))
