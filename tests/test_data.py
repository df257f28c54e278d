"""The sample files in data/ are what their README says: readable, checkable, and as their commands make them."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from sbtiny.cli import main as cli
from sbtiny.coldstart.rows import read_labelled
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import read_questions
from sbtiny.tasks.traces import read_traces
from sbtiny.tasks.verify import load_verifier

DATA = Path(__file__).parent.parent / "data"
FILES = sorted(path.name for path in DATA.glob("*.jsonl"))


def test_the_readme_names_every_file() -> None:
    readme = (DATA / "README.md").read_text()
    assert FILES
    assert [name for name in FILES if name not in readme] == []


@pytest.mark.parametrize("name", FILES)
def test_every_answer_is_one_the_verifier_can_check(name: str) -> None:
    verify = load_verifier("auto")
    for question in read_questions(str(DATA / name)):
        assert verify(f"so \\boxed{{{question.answer}}}", question), question
        assert not verify("\\boxed{no}", question), question


def test_the_generated_questions_are_what_the_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "questions.jsonl")])
    runpy.run_path(str(DATA / "generate.py"), run_name="__main__")
    assert (tmp_path / "questions.jsonl").read_text() == (DATA / "arithmetic_questions.jsonl").read_text()


def test_the_labelled_rows_are_what_make_data_builds(tmp_path: Path) -> None:
    """Their texts are a sampling's, which differs between processors: compared are the questions and the keys."""
    line = re.search(r"sbtiny (data build .+)$", (DATA.parent / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"`sbtiny {line}`" in (DATA / "README.md").read_text()
    built = tmp_path / "labelled.jsonl"
    cli.app(line.replace("data/labelled.jsonl", str(built)).split(), standalone_mode=False)
    rows, again = ([json.loads(text) for text in file.read_text().splitlines()] for file in (DATA / "labelled.jsonl", built))
    assert {tuple(row) for row in rows} == {tuple(row) for row in again}
    ids = [row["id"] for row in again]
    assert len(set(ids)) == len(ids)  # one answer a question, so that the rows can be read as questions too
    assert len(set(ids) ^ {row["id"] for row in rows}) <= 2


def test_the_labelled_rows_are_right_and_count_the_tokens_of_the_bundled_model(policy: Policy) -> None:
    file = str(DATA / "labelled.jsonl")
    counted = {row["id"]: len(policy.encode(row["response"])) for row in read_labelled(file)}
    assert {row["id"]: row["budget"] for row in read_labelled(file)} == counted, "the model has changed: run make data"
    verify = load_verifier("auto")
    for trace, question in zip(read_traces(file), read_questions(file), strict=True):
        assert verify(trace.response, question), trace.id
