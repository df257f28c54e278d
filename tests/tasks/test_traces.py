"""Answers written elsewhere, in every shape they come in."""

import json
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks.traces import read_traces, unverified_questions


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_traces(tmp_path: Path) -> None:
    row = {"question": "a?", "answer": 1, "response": "It is 1."}
    full = row | {"id": "t", "correct": True, "finished": False, "level": 4}
    known, bare, null = read_traces(write(tmp_path / "t.jsonl", full, row, row | {"correct": None, "finished": None}))
    assert (known.id, known.answer, known.response, known.correct, known.finished, known.level) == (
        "t", "1", "It is 1.", True, False, 4,
    )  # fmt: skip
    assert (bare.id, bare.correct, bare.finished, bare.level) == ("t-00002", None, True, None)
    assert (null.correct, null.finished) == (None, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response": None}, ["'response' is null"]),
        ({"correct": "yes"}, ["'correct' is \"yes\"", "true, false or null"]),
        ({"finished": 1}, ["'finished' is 1"]),
    ],
)
def test_wrong_traces(change: dict, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"question": "a?", "answer": 1, "response": "1"} | change)
    with pytest.raises(InputError) as caught:
        read_traces(path)
    assert [word for word in ["line 1", *words] if word not in str(caught.value)] == []


SAID = "Two and two are four. \\boxed{4}"
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": SAID}]


@pytest.mark.parametrize("shape", [{"prompt": "2+2?", "completion": SAID}, {"messages": TURNS}])
@pytest.mark.parametrize(
    ("more", "answer", "correct"),
    [
        ({}, "4", True),  # its own answer is all there is to compare with
        ({"answer": 5}, "5", None),  # is to be verified
        ({"answer": "4", "correct": True}, "4", True),
        ({"correct": False}, "4", False),
    ],
)
def test_examples_to_learn_from_are_traces(shape: dict, more: dict, answer: str, correct: bool | None, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", shape | more | {"level": 3})
    (found,) = read_traces(path)
    assert (found.id, found.question, found.response, found.level) == ("t-00001", "2+2?", SAID, 3)
    assert (found.answer, found.correct, found.finished) == (answer, correct, True)
    assert len(unverified_questions([found])) == (correct is None)
    assert found.where == f"{path}, line 1"


def test_a_completion_that_gives_no_answer_expressly_is_one_as_a_whole(tmp_path: Path) -> None:
    (found,) = read_traces(write(tmp_path / "t.jsonl", {"prompt": "Who wrote it?", "completion": "Jane Austen did"}))
    assert (found.answer, found.correct) == ("Jane Austen did", True)


@pytest.mark.parametrize(("written", "correct"), [("True", True), ("false", False), (True, True), (None, None)])
def test_a_flag_may_be_the_text_of_a_csv(written: object, correct: bool | None, tmp_path: Path) -> None:
    row = {"question": "a?", "answer": 1, "response": "1", "correct": written}
    assert read_traces(write(tmp_path / "t.jsonl", row))[0].correct is correct


def test_an_id_is_one_questions(tmp_path: Path) -> None:
    """Rows are told apart by question and id; two questions under one would pass for two answers."""
    one, other = ({"id": "a", "question": f"{n}?", "answer": 1, "response": "1"} for n in "xy")
    assert len(read_traces(write(tmp_path / "t.jsonl", one, one))) == 2
    with pytest.raises(InputError, match="line 2: an earlier row has the id 'a' and another question"):
        read_traces(write(tmp_path / "t.jsonl", one, other))
