"""Rows that make a budget surer, by examples/gsm8k_0.5b/sure_budgets.py."""

import runpy
import sys
from pathlib import Path

import pytest

from sbtiny import runs
from sbtiny.coldstart.rows import read_labelled
from sbtiny.tasks import arithmetic

SCRIPT = Path(__file__).parents[2] / "examples" / "gsm8k_0.5b" / "sure_budgets.py"


def test_the_first_questions_are_answered_and_the_others_get_a_budget(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [q for q in arithmetic.generate_questions("train", 600, seed=5) if q.level <= 2]
    runs.write_jsonl(tmp_path / "asked.jsonl", [{"id": q.id, "question": q.question, "answer": q.answer} for q in asked])
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as python does for a script
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "ANSWERED", 40)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(started), str(tmp_path / "asked.jsonl"), str(tmp_path / "rows.jsonl")])
    script["main"]()
    rows = read_labelled(str(tmp_path / "rows.jsonl"))
    answered, others = {q.id for q in asked[:40]}, {q.id for q in asked[40:]}
    assert {row["id"] for row in rows if row["response"]} <= answered
    assert all(row["given"] for row in rows if row["response"])
    budgets = [row["id"] for row in rows if not row["response"]]
    assert set(budgets) <= others
    assert len(budgets) == len(set(budgets)) > len(others) / 2  # a run of seconds does not state one for every question
    middle = script["find_middle"]
    assert (middle([100, None, 400], 1.0), middle([100, 400], 0.5), middle([None], 1.0)) == (200, 100, None)


def test_too_few_questions_are_refused_before_anything_is_sampled(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arithmetic.generate_questions("train", 400, seed=5)
    runs.write_jsonl(tmp_path / "asked.jsonl", [{"id": q.id, "question": q.question, "answer": q.answer} for q in asked])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(started), str(tmp_path / "asked.jsonl"), str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "has 400 questions, of which the first 400 are answered" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
