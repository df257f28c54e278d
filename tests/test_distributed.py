"""Two processes under accelerate do what one does: the same episodes, the same losses, one run folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sbtiny import distributed, runs
from sbtiny.cli.main import app
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.errors import InputError
from sbtiny.tasks import arithmetic

TWO = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHED = [*TWO, "--dynamo_backend", "no", "--main_process_port", "0", "-m", "sbtiny"]
GRPO = [
    "prompts_per_step=4",
    "num_generations=4",
    "micro_batch=4",
    "max_tokens=40",
    "sample_steps=1",
    "save_steps=2",
    "b_max_from_best=true",
]


def run(two: bool, *arguments: object) -> None:
    told = [*map(str, arguments), "--no-4bit", "--steps", "3"]
    if not two:
        return app(told, standalone_mode=False)
    command = [sys.executable, "-m", *LAUNCHED, *told]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: ") == 1
    return None


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "contrast", "reward", "tokens") if key in row]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_cold_start_of_two_processes(policy, tmp_path: Path, micro_batch: int) -> None:
    """Of four rows the two longer have a rival. In passes of two both are in one process: the other must not wait for it."""
    asked = zip(arithmetic.generate_questions("train", 3, seed=5), [(0,), (1,), (9, 18)], strict=True)
    rows = [make_row(policy, q, f"{'so ' * more}\\boxed{{{q.answer}}}") for q, lengths in asked for more in lengths]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    for two in (False, True):
        told = ("--set", f"sft.micro_batch={micro_batch}", "--set", "sft.contrast=0.5", "--set", "sft.contrast_share=0.3")
        run(two, "sft", "--data", tmp_path / "rows.jsonl", "-o", tmp_path / str(two), *told)
    one, both = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert len(one) == 4  # the first update has the contrast
    assert both == pytest.approx(one, abs=1e-4)


def test_grpo_of_two_processes(started: Path, tmp_path: Path) -> None:
    told = [word for setting in GRPO for word in ("--set", f"grpo.{setting}")]
    for two in (False, True):
        run(two, "grpo", "--run", started, "-o", tmp_path / str(two), "--limit", 12, "--force", *told)
    one, both = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert len(one) == 9
    assert both == pytest.approx(one, abs=1e-4)
    for name in ("samples.jsonl", "b_max.json"):
        assert (tmp_path / "True" / name).read_text() == (tmp_path / "False" / name).read_text()
    assert (tmp_path / "True" / "checkpoint-2" / "sbtiny.json").is_file()


def test_each_process_has_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        parts.append(distributed.shard(list(range(8))))
    assert [item for part in parts for item in part] == list(range(8))
    assert {len(part) for part in parts} == {2, 3}
    assert distributed.split_batch(12, 16, "x") == (4, 1)
    assert distributed.split_batch(12, 2, "x") == (2, 2)
    with pytest.raises(InputError, match="8 rows an update, which 3 processes cannot share"):
        distributed.split_batch(8, 4, "sft.batch")
    assert distributed.split_batch(12, 3, "x") == (2, 2)  # three do not divide the four rows of each


def test_alone_nothing_is_shared() -> None:
    assert distributed.is_main_process()
    assert distributed.broadcast_from_main(lambda: 7) == 7
    assert distributed.gather([1, 2]) == [1, 2] == distributed.shard([1, 2])
    assert distributed.split_batch(8, 4, "x") == (4, 2)
