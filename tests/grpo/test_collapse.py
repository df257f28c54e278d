"""A run made to go wrong is stopped by its alarm, and the last good checkpoint is there to go on from."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import GRPO

from sbtiny.pipeline import stages
from sbtiny.config import Settings
from sbtiny.errors import Failed
from sbtiny.training.checkpoint import is_whole, step_of

# The rate rises from step to step: the first ones still answer, then the policy is a ruin.
# Self-set groups alone: of others a step may have drawn all, and then it says nothing of the format.
WRONG = replace(GRPO, steps=30, lr=0.05, decay="constant_with_warmup", warmup=1.0, save_steps=1, patience=3, prompts=4, temperature=1.0,
                user_share=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def ruin(started: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder and what it said when it was stopped."""
    folder = tmp_path_factory.mktemp("ruin") / "run"
    with pytest.raises(Failed) as stopped:
        stages.run_grpo(Settings(grpo=WRONG), started, folder, force=True)
    return folder, str(stopped.value)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_stopped_with_its_cause_long_before_its_end(ruin: tuple[Path, str]) -> None:
    folder, said = ruin
    assert "collapse of format" in said
    assert "3 steps running" in said
    assert "lower grpo.lr" in said
    last = rows(folder)[-1]
    assert last["step"] < WRONG.steps
    assert last["alarms"]
    assert not (folder / "adapter").exists()


def test_the_last_good_checkpoint_is_kept_and_none_of_the_ruin(ruin: tuple[Path, str]) -> None:
    """Saved at every step; the figures of a step are those of the checkpoint before it."""
    folder, said = ruin
    figures = {row["step"]: row["malformed"] for row in rows(folder)}
    first_bad = max(figures) - WRONG.patience + 1
    kept = sorted(step_of(path) for path in folder.glob("checkpoint-*"))
    assert len(kept) == 2
    assert kept[-1] == first_bad - 1
    good = folder / f"checkpoint-{max(step for step in kept if step <= first_bad - 2)}"  # none was saved of a bad step that passed
    assert is_whole(good)
    assert f"last good checkpoint: {good})" in said
    assert figures[first_bad - 1] <= 0.5 < min(figures[step] for step in range(first_bad, max(figures) + 1))


def test_a_log_file_is_told_of_the_run(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from sbtiny.training import monitor

    monkeypatch.setattr(monitor, "console", Console(file=sys.stderr, width=80))
    stages.run_grpo(Settings(grpo=replace(GRPO, steps=2, save_steps=0)), started, tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grpo ")]
    assert [line.split()[1] for line in said] == ["1/2", "2/2"]
    assert all(word in said[0] for word in ("reward", "no spread", "malformed", "entropy", "sample+train s", "left 0:00:"))
