"""An adapter between two others, by examples/gsm8k_0.5b/average.py."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.rollout.load_policy import load_policy

SCRIPT = Path(__file__).parents[2] / "examples" / "gsm8k_0.5b" / "average.py"
WEIGHTS = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def other(started: Path, tmp_path: Path) -> Path:
    """A run whose adapter is three times that of `started`."""
    folder = shutil.copytree(started, tmp_path / "other")
    save_file({name: 3 * weight for name, weight in load_file(started / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("is_checkpoint", [False, True])
def test_it_lies_between_and_answers(
    started: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_checkpoint: bool
) -> None:
    out = tmp_path / "new" / "out"
    second = other / "adapter" if is_checkpoint else other
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(started), str(second), str(out), "--share", "0.25"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    for name, weight in load_file(started / WEIGHTS).items():
        found = load_file(out / WEIGHTS)[name].float()
        assert (found - 1.5 * weight.float()).abs().max() <= 2e-3 * weight.abs().max() + 1e-6
    assert load_policy(str(out), Settings(four_bit=False), 2).states_budget
    about = json.loads((out / "run.json").read_text())
    assert (about["parents"], about["share"], "parent" in about) == ([str(started), str(other)], 0.25, False)


def test_a_folder_in_use_and_a_broken_adapter_are_refused_and_nothing_is_left(
    started: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, mine = runpy.run_path(str(SCRIPT)), tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("my notes")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(started), str(other), str(mine)])
    with pytest.raises(InputError, match="is not empty"):
        script["main"]()
    (other / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes()[:1000])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(started), str(other), str(tmp_path / "out")])
    with pytest.raises(InputError, match="cannot be read"):
        script["main"]()
    assert sorted(place.name for place in tmp_path.iterdir()) == ["mine", "other"]


def test_adapters_that_differ_in_shape_are_refused(started: Path, other: Path) -> None:
    weights = load_file(other / WEIGHTS)
    save_file({name: weight[:1] for name, weight in weights.items()}, other / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="have other layers or another rank"):
        runpy.run_path(str(SCRIPT))["average_adapters"](started / "adapter", other / "adapter", 0.5)
