"""Rows of a run's right answers, by examples/gsm8k_0.5b/right_answers.py."""

import runpy
import sys
from pathlib import Path

import pytest

from sbtiny import runs
from sbtiny.coldstart.rows import read_labelled
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto

SCRIPT = Path(__file__).parents[2] / "examples" / "gsm8k_0.5b" / "right_answers.py"


def test_right_answers_are_given_rows_and_budgets_stay(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {q.id: q for q in arithmetic.generate_questions("train", 200, seed=5) if q.level <= 2}
    told = [{"id": q.id, "question": q.question, "answer": q.answer} for q in asked.values()]
    long = [row | {"response": f"{'so ' * 300}\\boxed{{{row['answer']}}}", "budget": 300, "given": True} for row in told[:3]]
    short = [row | {"response": f"\\boxed{{{row['answer']}}}", "budget": 9} for row in told]
    runs.write_jsonl(tmp_path / "rows.jsonl", long + short)
    runs.write_jsonl(tmp_path / "budgets.jsonl", [row | {"response": None, "budget": 110} for row in told])
    files = [str(tmp_path / name) for name in ("rows.jsonl", "out.jsonl")]
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as python does for a script
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(started), *files, "--budgets", str(tmp_path / "budgets.jsonl")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = read_labelled(files[1])
    answers, budgets = [row for row in rows if row["response"]], [row for row in rows if not row["response"]]
    assert [row["budget"] for row in budgets] == [100] * len(told)
    assert len([row for row in answers if row["budget"] == 300]) == 3
    own = [row for row in answers if row["budget"] < 300]
    assert len(own) > 10
    assert all(row["given"] and auto(row["response"], asked[row["id"]]) for row in own)
    assert len({(row["id"], row["response"]) for row in own}) >= len(own) / 2  # one may be an answer of both kinds
