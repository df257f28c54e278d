"""Rows of a run's own answers, by examples/gsm8k_0.5b/own_answers.py."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from sbtiny import runs
from sbtiny.coldstart.rows import read_labelled
from sbtiny.tasks import arithmetic

SCRIPT = Path(__file__).parents[2] / "examples" / "gsm8k_0.5b" / "own_answers.py"


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_answers_are_labelled_with_their_own_lengths_and_budgets_with_their_share(
    share: float, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [q for q in arithmetic.generate_questions("train", 800, seed=5) if q.level <= 2][:120]
    told = [{"id": q.id, "question": q.question, "answer": q.answer} for q in asked]
    runs.write_jsonl(tmp_path / "questions.jsonl", told)
    runs.write_jsonl(tmp_path / "budgets.jsonl", [row | {"response": None, "budget": 110} for row in told])
    files = [str(tmp_path / name) for name in ("questions.jsonl", "rows.jsonl")]
    line = [str(SCRIPT), str(started), *files, "--budgets", str(tmp_path / "budgets.jsonl"), "--share", str(share)]
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    answers, budgets = [row for row in rows if row["response"]], [row for row in rows if not row["response"]]
    assert 60 < len(answers) <= 120
    assert all(row["given"] and row["budget"] < 40 for row in answers)
    assert [row["budget"] for row in budgets] == [round(110 * share, -1)] * len(told)
    assert len(read_labelled(str(tmp_path / "rows.jsonl"))) == len(rows)


def test_the_nearest_are_kept_right_ones_first() -> None:
    keep = runpy.run_path(str(SCRIPT))["keep_nearest"]
    answers = [(right, 100, {"budget": budget}) for right, budget in [(False, 100), (True, 160), (True, 120), (False, 90), (True, 105)]]
    assert [row["budget"] for row in keep(answers, 4, 0.5)] == [105, 120, 100, 90]
