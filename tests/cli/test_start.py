"""What the stages need before they can start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

UNSLOTH = """
import sys
import torch
early = sorted({"trl", "transformers", "peft"} & set(sys.modules))
torch.cuda.is_available = lambda: False  # the other libraries must not take this machine for one with a GPU
"""
STAGES = """
import sys
import torch
torch.cuda.is_available = lambda: {gpu}
from sbtiny.cli.options import start_work
from sbtiny.config import Settings
start_work(Settings(backend={backend!r}))
import sbtiny.grpo.run
if "unsloth" in sys.modules:
    print("early:", sys.modules["unsloth"].early)
print("imported:", sorted({{"trl", "transformers", "peft", "unsloth"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("gpu", "backend", "said"),
    [
        (True, "auto", "early: []\nimported: ['peft', 'transformers', 'trl', 'unsloth']\n"),
        pytest.param(True, "unsloth", "early: []\nimported: ['peft', 'transformers', 'trl', 'unsloth']\n", marks=pytest.mark.slow),
        (False, "auto", "imported: ['peft', 'transformers', 'trl']\n"),
        pytest.param(False, "transformers", "imported: ['peft', 'transformers', 'trl']\n", marks=pytest.mark.slow),
    ],
)
def test_unsloth_comes_before_what_it_patches_and_only_with_a_gpu(gpu: bool, backend: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + STAGES.format(gpu=gpu, backend=backend)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, said), done.stderr[-500:]


def test_a_run_and_its_metrics_name_the_stage_alike(started: Path) -> None:
    from sbtiny.runs import read_run
    from sbtiny.tasks.sources import read_rows

    assert {row["stage"] for row in read_rows(str(started / "metrics.jsonl"))} == {read_run(started)["kind"]} == {"sft"}


def test_traces_beyond_the_limit_are_said(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from sbtiny.coldstart.build import first_traces

    file = tmp_path / "traces.jsonl"
    file.write_text('{"question": "1+1=", "answer": "2", "response": "\\\\boxed{2}"}\n' * 3)
    assert len(first_traces(str(file), 3)) == 3
    assert capfd.readouterr().err == ""
    assert len(first_traces(str(file), 2)) == 2
    assert "the first 2 of 3 traces; --limit reads more" in " ".join(capfd.readouterr().err.split())


def test_labelled_rows_of_evaluation_questions_are_left_out_and_told_with_their_lines(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from sbtiny.coldstart.rows import read_labelled
    from sbtiny.config import EvalSettings, Settings
    from sbtiny.tasks.leaks import drop_eval_questions

    file, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    asked = [{"id": n, "question": f"{n} + 1?", "response": "2", "budget": 1} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    held.write_text('{"question": "2 + 1", "answer": "3"}\n')
    kept, left = drop_eval_questions(read_labelled(str(file)), str(file), Settings(eval=EvalSettings(task=str(held))))
    assert ([row["id"] for row in kept], left) == (["0", "1", "3"], 1)
    told = "".join(capfd.readouterr().err.split())  # rich breaks long paths too
    assert f"leftout:1;{file},line3" in told
