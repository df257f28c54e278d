"""unsloth on a CPU against transformers, and ours on the trainers that it writes for a GPU. `make test-unsloth` runs this."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

WAYS = ("transformers", "unsloth", "rewritten")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_spec("unsloth"), reason="no unsloth: make test-unsloth")]


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own. Fails with the end of its stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-1500:]
    return done


def test_the_doctor_tries_it(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path, "-m", "sbtiny", "doctor", "--json").stdout)["extras"]["unsloth"]
    assert (found["state"], found["found"].partition(":")[0]) == ("ok", "imports, and its trainers fit")


@pytest.fixture(scope="module")
def records(started: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `stages.py` printed, by way."""
    stages, results = str(Path(__file__).with_name("stages.py")), {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp(way)
        results[way] = json.loads(run(folder, stages, way, str(started), str(folder)).stdout.splitlines()[-1])
    return results


def test_each_way_has_the_trainers_that_it_is_named_for(records: dict[str, dict]) -> None:
    own = ["trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"]
    assert records["transformers"]["trainers"] == records["unsloth"]["trainers"] == own
    assert records["rewritten"]["trainers"] == ["UnslothSFTTrainer", "UnslothGRPOTrainer"]
    assert [records[way]["gaps"] for way in WAYS] == [[[], []]] * 3


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("stage", ["sft", "contrast", "grpo", "kl"])
def test_a_stage_trains_as_with_transformers(stage: str, way: str, records: dict[str, dict]) -> None:
    expected, found = (records[name]["metrics"][stage] for name in ("transformers", way))
    assert len(expected) == len(found) == {"sft": 20, "contrast": 4, "grpo": 6, "kl": 4}[stage]
    for row, other in zip(expected, found, strict=True):
        for key in row.keys() & {"loss", "contrast", "reward", "learning_rate", "tokens"}:
            assert other[key] == pytest.approx(row[key], abs=1e-3), (row["step"], key)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(way: str, records: dict[str, dict]) -> None:
    assert records[way]["resumed"] == [True, True]


def test_a_run_of_unsloth_is_exported_and_passes_its_check(records: dict[str, dict], tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "sbtiny", "export", records["unsloth"]["run"], "--output", "exported", "--questions", "8", "--json")
    assert json.loads(done.stdout)["passed"]
