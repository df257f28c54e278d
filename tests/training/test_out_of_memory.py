"""Out of memory and NaN in the middle of training: the first goes on with less, the second stops at its step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import GRPO, rows_of, settings_of

from sbtiny.coldstart import trainer as sft
from sbtiny.coldstart.run import run_sft
from sbtiny.config import GrpoSettings, Settings, SftSettings
from sbtiny.errors import Failed
from sbtiny.grpo import trainer as grpo
from sbtiny.grpo.run import run_grpo
from sbtiny.load_settings import load_settings
from sbtiny.training.checkpoint import last_checkpoint, resume_signature, step_of
from sbtiny.training.monitor import MAX_SKIPPED_UPDATES, TrainingMonitor
from sbtiny.training.out_of_memory import halve_micro_batch

# Of what a run changes; an update computed in two parts differs by rounding, which Adam makes larger where a gradient is near zero.
NEAR = 0.1


def breaking(monkeypatch: pytest.MonkeyPatch, trainer: type, step: int, does: Callable[[torch.Tensor], Any]) -> None:
    """The first loss of the update after `step` is what `does` makes of it."""
    compute, broken = trainer.compute_loss, []

    def compute_loss(self: Any, *arguments: Any, **named: Any) -> Any:
        loss = compute(self, *arguments, **named)
        if self.state.global_step == step and not broken:
            broken.append(step)
            return does(loss)
        return loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)


def no_memory(_: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(one: Path, other: Path) -> float:
    """Mean distance of the weights that begin at zero."""
    a, b = adapter(one), adapter(other)
    return sum((a[name] - b[name]).abs().mean().item() for name in a if "lora_B" in name)


@pytest.mark.parametrize(("step", "beta"), [(0, 0.0), (3, 0.5)])  # with beta there is a second adapter
def test_grpo_out_of_memory_goes_on_with_half_the_micro_batch(
    step: int, beta: float, started: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first checkpoint it begins again, after it it goes on from there; the rows are the same."""
    settings = settings_of(replace(GRPO, beta=beta))
    if beta:
        whole = run_grpo(settings, started, tmp_path / "whole")
    breaking(monkeypatch, grpo.BudgetGrpoTrainer, step, no_memory)
    run = run_grpo(settings, started, tmp_path / "run")
    assert "out of memory: grpo.micro_batch 4 -> 2" in capsys.readouterr().err
    assert load_settings(run / "config.yaml").grpo.micro_batch == 2
    assert [row["step"] for row in rows_of(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 6]
    asked = [[(row["step"], row["question"]) for row in rows_of(folder / "samples.jsonl")] for folder in (whole, run)]
    assert asked[0] == asked[1]
    assert apart(whole, run) < NEAR * apart(whole, started)


@pytest.mark.parametrize(("prompts", "group", "most", "fits"), [(3, 4, 16, 6), (3, 4, 8, 3), (5, 3, 4, 1), (8, 5, 40, 20)])
def test_half_of_it_divides_the_rows_again(prompts: int, group: int, most: int, fits: int) -> None:
    settings = Settings(grpo=GrpoSettings(prompts_per_step=prompts, num_generations=group, micro_batch=most))
    assert halve_micro_batch(settings, "grpo").grpo.micro_batch == fits


def test_cold_start_out_of_memory_goes_on_with_half_the_micro_batch(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(sft=SftSettings(rows=str(started.parent / "terse.jsonl"), steps=8, batch=8, micro_batch=8, save_steps=2))
    whole = run_sft(settings, tmp_path / "whole")
    breaking(monkeypatch, sft.ColdStartTrainer, 5, no_memory)
    run = run_sft(settings, tmp_path / "run")
    assert load_settings(run / "config.yaml").sft.micro_batch == 4
    assert apart(whole, run) < NEAR * sum(weight.abs().mean().item() for name, weight in adapter(whole).items() if "lora_B" in name)


def test_single_rows_that_do_not_fit_are_an_end(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.BudgetGrpoTrainer, "compute_loss", lambda *_, **__: no_memory(torch.zeros(())))
    with pytest.raises(Failed, match=r"out of memory with grpo\.micro_batch 1: .* a lower grpo\.max_num_seqs"):
        run_grpo(settings_of(), started, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(Failed, match=r"sft\.micro_batch 1: a new run without the longest rows would make room"):
        halve_micro_batch(Settings(sft=SftSettings(micro_batch=1)), "sft")
    fewer = settings_of(replace(GRPO, max_num_seqs=2))
    assert resume_signature(fewer, "grpo", []) == resume_signature(settings_of(), "grpo", [])  # so the advice can be followed


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_in_float16_an_overflow_is_borne_and_a_run_of_them_is_not(figure: str, tmp_path: Path) -> None:
    """Its scaler skips such an update and tries a lower scale; it cannot repair a NaN loss."""
    watch = TrainingMonitor("grpo", 100, tmp_path)
    bad = {figure: float("inf")}
    if figure == "grad_norm":
        for step in range(1, MAX_SKIPPED_UPDATES):
            watch._check_finite(bad, True, step)
        watch._check_finite({"grad_norm": 1.0}, True, MAX_SKIPPED_UPDATES)
        for step in range(1, MAX_SKIPPED_UPDATES):
            watch._check_finite(bad, True, MAX_SKIPPED_UPDATES + step)
    with pytest.raises(Failed, match=f"{figure} is NaN or infinite at step 41"):
        watch._check_finite(bad, True, 41)


def test_nan_in_grpo_stops_at_its_step_and_names_cause_and_checkpoint(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as broken:
        breaking(broken, grpo.BudgetGrpoTrainer, 3, lambda loss: loss * float("nan"))
        with pytest.raises(Failed, match=r"NaN or infinite at step 4, most likely from a learning rate .*checkpoint-2\)"):
            run_grpo(settings_of(), started, run)
    assert step_of(last_checkpoint(run)) == 2
    assert not (run / "adapter").exists()
    run_grpo(settings_of(), started, run, resume=True)
    assert all(weight.isfinite().all() for weight in adapter(run).values())
