"""The losses of three updates of SFT and of GRPO, as they were: a change of them is a change of what is trained."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sbtiny.budget.reward import Reward
from sbtiny.coldstart.run import run_sft
from sbtiny.config import Settings
from sbtiny.grpo.group_reward import RewardInput
from sbtiny.grpo.run import run_grpo
from sbtiny.load_settings import load_settings
from sbtiny.models.device import detect_device
from sbtiny.tasks.sources import read_rows
from sbtiny.training import arguments

ROWS = Path(__file__).parent.parent.parent / "data" / "labelled.jsonl"
CHANGED = {
    "model": "tiny", "sft.rows": str(ROWS), "sft.steps": 3, "sft.batch": 4, "sft.micro_batch": 2, "grpo.steps": 3,
    "grpo.prompts_per_step": 2, "grpo.num_generations": 4, "grpo.micro_batch": 4, "grpo.max_tokens": 40,
    "grpo.user_share": 0, "sft.warmup": 0, "grpo.warmup": 0,
}  # fmt: skip
# Made with the tested set on an AMD EPYC; torch, oneDNN and MKL held to AVX2, and to less, gave the same five digits.
SFT = {"loss": (1.33668, 0.80612, 0.33325), "grad_norm": (0.53617, 0.3679, 0.12343)}
GRPO = {"loss": (0.03346, 0.14364, 0.29594), "grad_norm": (0.00643, 0.00903, 0.05822)}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """In float32 on any processor: some compute in bfloat16, which is another loss in the third digit."""
    monkeypatch.setattr(arguments, "detect_device", lambda: replace(detect_device(), dtype="float32"))
    return load_settings(overrides=list(CHANGED.items()))


def shorter(_: str, answers: Sequence[RewardInput], b_max: float, alpha: float) -> list[Reward]:
    """A reward that an untrained model can earn; the paper's is the same for all that is malformed."""
    return [Reward(-answer.length / 100, 0.0, 0.0, 0.0, False) for answer in answers]


def logged(run: Path, key: str) -> list[Any]:
    return [row[key] for row in read_rows(str(run / "metrics.jsonl")) if "loss" in row]


def test_losses_of_three_updates_are_what_they_were(settings: Settings, tmp_path: Path) -> None:
    start = run_sft(settings, tmp_path / "sft")
    run = run_grpo(settings, start, tmp_path / "grpo", force=True, reward=shorter)
    for folder, golden in ((start, SFT), (run, GRPO)):
        assert logged(folder, "loss") == pytest.approx(golden["loss"], abs=1e-3)
        assert logged(folder, "grad_norm") == pytest.approx(golden["grad_norm"], rel=0.02)


def test_gradients_of_a_cold_start_are_clipped_to_the_setting(settings: Settings, tmp_path: Path) -> None:
    """Adam divides by what it has seen, so only a gradient that is next to nothing beside its epsilon leaves the weights."""
    run = run_sft(replace(settings, sft=replace(settings.sft, max_grad_norm=1e-12)), tmp_path / "sft")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name) < 1e-6
    assert logged(run, "grad_norm")[0] == pytest.approx(SFT["grad_norm"][0], rel=0.02)


def test_kl_is_measured_from_the_policy_that_training_began_with(settings: Settings, started: Path, tmp_path: Path) -> None:
    """Not from the bundled model without its adapter; a run that goes on measures from where it began, not from where it stopped."""
    changed = replace(settings, grpo=replace(settings.grpo, beta=0.5, steps=2, save_steps=1))
    run = run_grpo(changed, started, tmp_path / "run", force=True, reward=shorter)
    first, second = logged(run, "kl")
    assert first == pytest.approx(0, abs=1e-4)
    assert second > 0.01
    assert {file.name for file in (run / "adapter").iterdir()} == {file.name for file in (started / "adapter").iterdir()}
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    for last in ("adapter", "checkpoint-2"):
        shutil.rmtree(run / last)
    run_grpo(changed, started, run, resume=True, reward=shorter)
    assert logged(run, "kl")[1:] == [pytest.approx(second, rel=1e-3)]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(again[name], weight, atol=1e-5) for name, weight in whole.items())
