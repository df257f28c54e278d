"""Killed at any moment and resumed, a run ends as if nothing had happened: the same adapter, the same rows."""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import GRPO, rows_of, settings_of
from transformers import Trainer, TrainerState

from sbtiny import runs
from sbtiny.cli.train import find_start
from sbtiny.coldstart import trainer as sft
from sbtiny.coldstart.run import run_sft
from sbtiny.config import DataSettings, PromptSettings, Settings, SftSettings
from sbtiny.errors import Failed, InputError
from sbtiny.grpo.rollouts import Rollouts
from sbtiny.grpo.run import run_grpo
from sbtiny.load_settings import load_settings
from sbtiny.models.chat_template import with_prompt
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.verify import load_verifier
from sbtiny.training import checkpoint, monitor
from sbtiny.training.checkpoint import MANIFEST, last_checkpoint


class Killed(BaseException):
    """Stands for kill -9 where the test needs the process afterwards: nothing of ours catches it."""


def digest(folder: Path) -> str:
    return sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def result(folder: Path) -> tuple:
    """All that must be equal: the adapter, as a digest (pytest takes hours to show how megabytes differ), and the logs, times aside."""
    return (
        digest(folder),
        rows_of(folder / "metrics.jsonl"),
        rows_of(folder / "samples.jsonl") if (folder / "samples.jsonl").exists() else [],
    )


@contextmanager
def killed(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: Callable[..., bool]) -> Iterator[None]:
    """The process dies in `owner.name`, before it does anything, the first time that `when(*arguments)` holds."""
    old = getattr(owner, name)

    def dying(*arguments: object, **named: object) -> object:
        if when(*arguments, **named):
            raise Killed
        return old(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            yield


MOMENTS = {
    "in the first step, before any checkpoint": (Rollouts, "relabel", lambda self, *_: self.metrics["alpha"] == 6.0),
    "between steps": (Rollouts, "__call__", lambda self, _, trainer: trainer.state.global_step == 3),
    "before the first file of a checkpoint": (Trainer, "save_model", lambda self, *_, **__: self.state.global_step == 4),
    "between the files of a checkpoint": (Trainer, "_save_rng_state", lambda self, _: self.state.global_step == 4),
    "between the files of the first one": (Trainer, "_save_rng_state", lambda self, _: self.state.global_step == 2),
    "before the manifest": (checkpoint.ManifestCallback, "on_save", lambda self, args, state, *_, **__: state.global_step == 4),
    "after the last checkpoint": (monitor.TrainingMonitor, "save_adapter", lambda self, _: True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_as_if_nothing_had_happened(
    moment: str, whole: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with killed(monkeypatch, *MOMENTS[moment]):
        run_grpo(settings_of(), started, folder)
    assert not (folder / "adapter").exists()
    run_grpo(settings_of(), started, folder, resume=True)
    assert result(folder) == result(whole)
    assert all((path / MANIFEST).is_file() for path in folder.glob("checkpoint-*"))
    assert not (folder / "README.md").exists()  # TRL's card would keep the report's out


def test_the_runs_compared_above_learnt_something(whole: Path, started: Path) -> None:
    adapter, metrics, samples = result(whole)
    assert adapter != digest(started)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6, 6]
    assert [row["step"] for row in samples] == sorted([*range(6)] * 2)
    assert len({row["question"] for row in samples[:4]}) == 4  # in their order, each once before any comes again
    kept = json.loads((whole / "checkpoint-6" / MANIFEST).read_text())
    assert (kept["step"], kept["state"]["alpha"]) == (6, pytest.approx(metrics[5]["alpha"]))
    assert kept["state"]["shortest"].keys() <= json.loads((whole / "b_max.json").read_text()).keys()


def test_a_run_does_not_go_on_from_another_cold_start(started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        shutil.copytree(started, tmp_path / name)
    run = runs.create_run("grpo", tmp_path / "run", settings_of(), parent=str(tmp_path / "one"))
    assert find_start(str(tmp_path / "one"), run) == find_start(None, run) == tmp_path / "one"
    with pytest.raises(InputError, match=r"--run is .*other, but .*run went on from .*one: leave --run out"):
        find_start(str(tmp_path / "other"), run)


@pytest.fixture(scope="module")
def whole_cold_start(started: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """The uninterrupted cold start and its settings: 4 updates an epoch."""
    folder = tmp_path_factory.mktemp("cold")
    data = folder / "rows.jsonl"
    data.write_text("".join((started.parent / "terse.jsonl").read_text().splitlines(keepends=True)[:32]))
    settings = Settings(sft=SftSettings(rows=str(data), batch=8, micro_batch=4, epochs=4, save_steps=2))
    return settings, run_sft(settings, folder / "whole")


@pytest.mark.parametrize("stop", [6, 8])
def test_cold_start_resumes_within_and_between_epochs(
    stop: int, whole_cold_start: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, whole = whole_cold_start
    with killed(monkeypatch, sft.ManifestCallback, "on_step_end", lambda self, args, state, *_, **__: state.global_step == stop + 1):
        run_sft(settings, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").name == f"checkpoint-{stop}"
    roomier = replace(settings, sft=replace(settings.sft, max_length=2 * settings.sft.max_length))  # refuses rows, cuts none
    run_sft(roomier, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == result(whole)


def test_a_cold_start_whose_model_brings_an_instruction_in_its_template_resumes(
    tiny, whole_cold_start: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an export of ours does: the run keeps it as its own."""
    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.chat_template = with_prompt(tokenizer.chat_template, PromptSettings(instruction="Think."))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    settings = replace(whole_cold_start[0], model=str(tmp_path / "model"))
    settings = replace(settings, sft=replace(settings.sft, steps=4))
    with killed(monkeypatch, sft.ManifestCallback, "on_step_end", lambda self, args, state, *_, **__: state.global_step == 3):
        run_sft(settings, tmp_path / "run")
    run = run_sft(load_settings(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)
    assert load_settings(run / "config.yaml").prompt.instruction == runs.read_run(run)["prompt"]["instruction"] == "Think."


def test_a_cold_start_stopped_while_it_samples_its_rows_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSettings(limit=12, samples_per_question=1, rows_per_question=1)
    settings, part = Settings(data=data, sft=SftSettings(steps=1, batch=4)), tmp_path / "run" / "data.jsonl.part"

    def verify(*answer: Any) -> bool:
        if part.exists() and len(part.read_text().splitlines()) > 5:
            raise KeyboardInterrupt
        return load_verifier("auto")(*answer)

    with monkeypatch.context() as patched:
        patched.setattr("sbtiny.coldstart.build.load_verifier", lambda _: verify)
        with pytest.raises(KeyboardInterrupt):
            run_sft(settings, tmp_path / "run")
    done = part.read_text().splitlines()
    assert len(done) == 6
    real, asked = Policy.sample, []
    monkeypatch.setattr(Policy, "sample", lambda self, requests, *more: asked.extend(requests) or real(self, requests, *more))
    run = run_sft(load_settings(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)
    assert (run / "adapter").is_dir()
    assert len(asked) == 12 - 5


def test_a_gradient_that_is_nan_right_after_a_resume_names_the_checkpoint_it_began_from(stopped: Path) -> None:
    watch = monitor.TrainingMonitor("grpo", 9, stopped)
    watch.advance = lambda *_: None
    watch.on_train_begin(None, TrainerState(global_step=6), None)
    with pytest.raises(Failed, match=r"last good checkpoint: .*checkpoint-6\)"):
        watch._check_finite({"loss": 0.1, "grad_norm": math.nan}, False, 7)


# ---- what is refused, and what is picked -----------------------------------------------------------------------------


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The whole run as it would be had it been killed at the end."""
    folder = tmp_path / "stopped"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "adapter")
    return folder


CHANGED = {
    "grpo.learning_rate is 0.002 but was 0.001": replace(GRPO, learning_rate=2e-3),
    "grpo.steps is 7 but was 6": replace(GRPO, steps=7),
    "grpo.max_tokens is 41 but was 40": replace(GRPO, max_tokens=41),
}


@pytest.mark.parametrize("said", CHANGED)
@pytest.mark.parametrize("edited", [False, True])
def test_a_changed_setting_is_refused_by_name(said: str, edited: bool, stopped: Path, started: Path) -> None:
    if edited:  # in the run's own file as well: then its checkpoints still know
        (stopped / "config.yaml").write_text(settings_of(CHANGED[said]).as_yaml())
    before = sorted(stopped.rglob("*"))
    with pytest.raises(InputError, match=said):
        run_grpo(settings_of(CHANGED[said]), started, stopped, resume=True)
    assert sorted(stopped.rglob("*")) == before


def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(tmp_path: Path) -> None:
    new = checkpoint.resume_signature(Settings(), "sft", ["a question"])
    old = {key: value for key, value in new.items() if key != "sft.contrast_share"}
    checkpoint.check_settings_match(old, new, tmp_path)
    checkpoint.check_settings_match(old | {"grpo.max_num_seqs": 8}, new, tmp_path)  # of a version in which it might not change
    with pytest.raises(InputError, match=r"sft.contrast_share is 0.5 but was 1.0"):
        checkpoint.check_settings_match(old, new | {"sft.contrast_share": 0.5}, tmp_path)


def test_another_seed_engine_and_other_questions_are_refused(stopped: Path, started: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='engine is "generate" but was "ours"'):
        run_grpo(replace(settings_of(), engine="generate"), started, stopped, resume=True)
    with pytest.raises(InputError, match="seed is 1 but was 0"):
        run_grpo(replace(settings_of(), seed=1), started, stopped, resume=True)
    runs.write_json(stopped / "run.json", {key: value for key, value in runs.read_run(stopped).items() if key != "data"})
    with pytest.raises(InputError, match=r"the training data differs from the data with which .*checkpoint-6 was made"):
        checkpoint.prepare_resume(stopped, settings_of(), "grpo", ["other questions"])


def test_other_questions_are_refused_before_the_first_checkpoint_too(stopped: Path, started: Path) -> None:
    """Else the lengths in b_max.json would be taken for theirs: they are kept by the number of a line."""
    shutil.rmtree(stopped / "checkpoint-6")
    shutil.rmtree(stopped / "checkpoint-4")
    runs.write_json(stopped / "run.json", runs.read_run(stopped) | {"data": "of other questions"})
    with pytest.raises(InputError, match=r"the training data differs from the data with which .* was made"):
        run_grpo(settings_of(), started, stopped, resume=True)


def test_a_model_that_has_moved_is_known_by_its_fingerprint(stopped: Path) -> None:
    moved = replace(settings_of(), model="/elsewhere/tiny")
    assert checkpoint.prepare_resume(stopped, moved, "grpo", ()).name == "checkpoint-6"
    about = runs.read_run(stopped)
    runs.write_json(stopped / "run.json", {key: value for key, value in about.items() if key != "base"})
    with pytest.raises(InputError, match='model is "/elsewhere/tiny" but was'):
        checkpoint.prepare_resume(stopped, moved, "grpo", ())


def test_a_line_separator_in_a_question_parts_no_row(tmp_path: Path) -> None:
    """One of GSM8K's has such a character."""
    for step in range(3):
        runs.append_jsonl(tmp_path / "samples.jsonl", {"step": step, "question": "a\u2028b\x85c"})
    checkpoint.filter_jsonl(tmp_path / "samples.jsonl", lambda row: row["step"] < 2)
    kept = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in kept if line] == [0, 1]


def test_how_often_to_save_may_change(stopped: Path, started: Path, whole: Path) -> None:
    run_grpo(settings_of(replace(GRPO, save_steps=50, sample_steps=9)), started, stopped, resume=True)
    assert result(stopped)[0] == result(whole)[0]


def test_a_finished_run_is_not_gone_on_with(whole: Path, started: Path) -> None:
    with pytest.raises(InputError, match="is finished"):
        run_grpo(settings_of(), started, whole, resume=True)


def test_only_whole_checkpoints_are_picked(stopped: Path) -> None:
    assert last_checkpoint(stopped).name == "checkpoint-6"
    (stopped / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    assert last_checkpoint(stopped).name == "checkpoint-4"
    (stopped / "checkpoint-4" / "rng_state.pth").unlink()  # as when it was being removed
    assert last_checkpoint(stopped) is None


def test_a_last_line_that_was_being_written_is_dropped(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoint-6")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    kept = json.loads((stopped / "checkpoint-4" / MANIFEST).read_text())["settings"]
    assert config["grpo"]["learning_rate"] == kept["grpo.learning_rate"]
    assert checkpoint.prepare_resume(stopped, settings_of(), "grpo", ()).name == "checkpoint-4"
    assert [row["step"] for row in rows_of(stopped / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {row["step"] for row in rows_of(stopped / "samples.jsonl")} == {0, 1, 2, 3}


def test_the_newest_unfinished_run_of_a_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, (kind, done) in enumerate([("grpo", True), ("sft", False), ("grpo", False), ("grpo", False)]):
        folder = runs.create_run(kind, runs.ROOT / f"run{age}", load_settings())
        runs.write_json(folder / "run.json", runs.read_run(folder) | {"started": f"2026-01-01 10:00:0{9 - age}"})
        if done:
            (folder / "adapter").mkdir()
    assert runs.newest_unfinished("grpo").name == "run2"
    shutil.rmtree(runs.ROOT / "run1")
    with pytest.raises(InputError, match="no unfinished sft run"):
        runs.newest_unfinished("sft")


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def command(start: Path, folder: Path, *more: str) -> list[str]:
    chosen = {key: value for key, value in yaml.safe_load(settings_of().as_yaml())["grpo"].items() if value is not None}
    flags = [flag for key, value in chosen.items() for flag in ("--set", f"grpo.{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "sbtiny", "grpo", "--run", str(start), "--output", str(folder), *flags, *more]


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(whole: Path, started: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "run", random.Random(time.time_ns())
    kills, resume = 0, ()
    while kills < 5:
        process = subprocess.Popen(command(started, folder, *resume), stderr=subprocess.PIPE, text=True)
        before = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0
        while process.poll() is None and not (folder / "b_max.json").exists():
            time.sleep(0.01)
        while process.poll() is None and not checked(folder, before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() in (None, 0), process.stderr.read()[-500:]
        process.kill()
        process.wait()
        if (folder / "adapter").exists():  # it had done its last step
            shutil.rmtree(folder)
            resume = ()
            continue
        kills, resume = kills + 1, ("--resume",)
    subprocess.run(command(started, folder, "--resume"), check=True, capture_output=True)
    assert result(folder) == result(whole)


def checked(folder: Path, before: int) -> bool:
    """The run does its steps now: its logs have been cut to the checkpoint and grow again."""
    file = folder / "metrics.jsonl"
    return file.exists() and len(file.read_text().splitlines()) != before
