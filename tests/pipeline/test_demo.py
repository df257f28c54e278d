"""`sbtiny demo` from end to end with settings of seconds, and a sweep over numbers that a model really says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.cli import main as cli
from sbtiny.config import EvalSettings, Settings
from sbtiny.evaluation.run import SWEEP, run_eval
from sbtiny.runs import read_json
from sbtiny.tasks.sources import read_rows

SMALL = {
    "data.limit": 12, "data.samples_per_question": 1, "data.max_tokens": 300, "sft.steps": 2, "grpo.steps": 2, "grpo.prompts_per_step": 2,
    "grpo.num_generations": 4, "grpo.max_tokens": 40, "eval.limit": 8, "eval.max_tokens": 80,
}  # fmt: skip


def test_the_demo_evaluates_each_stage_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    cli.app(["demo", "--json", *changed], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    folder = tmp_path / "runs" / "demo"
    assert told == read_json(folder / "report.json") | {"page": "runs/demo/report.html"}
    assert [told[stage]["questions"] for stage in ("base", "sft", "grpo")] == [8] * 3
    assert told["seconds"].keys() == {"eval_base", "sft", "eval_sft", "grpo", "calibrate", "eval_grpo"}
    assert [each["budget"] for each in told["sweep"]] == list(SWEEP)
    ids = [[row["id"] for row in read_rows(str(place / "eval_samples.jsonl"))] for place in (folder / "base", folder / "sft", folder)]
    assert ids[0] == ids[1] == ids[2]  # so that the change can be paired
    assert told["accuracy_change_ci95"] is not None
    assert (read_json(folder / "run.json")["kind"], read_json(folder / "sft" / "run.json")["kind"]) == ("grpo", "sft")
    for name in (
        "report.html",
        "README.md",
        "adapter",
        "sft/adapter",
        "sft/data.jsonl",
        "preflight.json",
        "calibration.json",
        "plots/accuracy_tokens.png",
    ):
        assert (folder / name).exists(), name


def test_a_sweep_gives_multiples_of_the_budgets_that_the_model_says(started: Path, tmp_path: Path) -> None:
    settings = replace(Settings(), eval=EvalSettings(limit=12, max_tokens=60))
    run_eval(str(started), settings, tmp_path, sweep=True)
    half, one, two, four = (each["mean_budget"] for each in read_json(tmp_path / "sweep.json"))
    assert one > 1
    assert (two, four) == pytest.approx((2 * one, 4 * one))
    assert half == pytest.approx(one / 2, abs=0.5)  # of whole numbers
    own = [row["budget"] for row in read_rows(str(tmp_path / "eval_samples.jsonl")) if row["budget"]]
    assert min(own) <= one <= max(own)
