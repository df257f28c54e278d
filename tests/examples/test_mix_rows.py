"""Rows of answers and of foretold budgets put together, by examples/gsm8k_0.5b/mix_rows.py."""

import json
import runpy
import sys
from pathlib import Path
from statistics import geometric_mean

import pytest

from sbtiny import runs
from sbtiny.coldstart.rows import read_labelled

SCRIPT = Path(__file__).parents[2] / "examples" / "gsm8k_0.5b" / "mix_rows.py"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """What `data build` with a quantile writes: budgets alone, given answers, a stated one."""
    rows = [{"id": f"q{i}", "question": f"{i} + 1?", "answer": str(i + 1), "response": None, "budget": 150 + 10 * i} for i in range(20)]
    rows += [row | {"response": "\\boxed{1}", "budget": 5, "given": True} for row in rows[:8]]
    rows += [row | {"response": "\\boxed{1}", "budget": 5} for row in rows[:2]]
    runs.write_jsonl(tmp_path / "built.jsonl", rows)
    return tmp_path / "built.jsonl"


def mix(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as python does for a script
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_budgets_keep_their_ratios_and_answers_their_lengths(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    mix(monkeypatch, out, "--budgets", built, "--count", 15, "--mean", 120, "--answers", f"{built}:3", "--answers", built)
    rows = read_labelled(str(out))
    answers, budgets = [row for row in rows if row["response"]], [row for row in rows if not row["response"]]
    assert [row["budget"] for row in answers] == [5] * 11
    assert all(row["given"] for row in answers)
    assert len({row["id"] for row in budgets}) == len(budgets) == 15
    before = {row["id"]: row["budget"] for row in map(json.loads, built.read_text().splitlines()[:20])}
    share = 120 / geometric_mean(before.values())
    assert all(abs(row["budget"] - share * before[row["id"]]) <= 5 for row in budgets)


@pytest.mark.parametrize(("kind", "said"), [("budgets", "no rows of a budget alone"), ("answers", "no given rows")])
def test_a_file_without_the_rows_asked_for_is_refused(
    kind: str, said: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = built.read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[20:] if kind == "budgets" else lines[:20]))
    files = {"budgets": built, "answers": built, kind: tmp_path / "other.jsonl"}
    with pytest.raises(SystemExit, match="2"):
        mix(monkeypatch, tmp_path / "out.jsonl", "--mean", 120, "--budgets", files["budgets"], "--answers", files["answers"])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_read_is_not_written_over(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = built.read_bytes()
    runs.write_jsonl(tmp_path / "answers.jsonl", [])
    for out in (built, tmp_path / "answers.jsonl"):
        with pytest.raises(SystemExit, match="2"):
            mix(monkeypatch, out, "--mean", 120, "--budgets", built, "--answers", f"{tmp_path / 'answers.jsonl'}:3")
        assert "is what is read" in capsys.readouterr().err
    assert built.read_bytes() == before


@pytest.mark.parametrize("number", ["0", "0.5", "many"])
def test_a_count_is_a_whole_number(number: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="2"):
        mix(monkeypatch, tmp_path / "out.jsonl", "--mean", 120, "--budgets", built, "--count", number)
    assert not (tmp_path / "out.jsonl").exists()
