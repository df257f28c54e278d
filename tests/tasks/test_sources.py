import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question, read_questions, read_rows

MATH_ROW = {"problem": "2+2?", "solution": "It is \\boxed{4}.", "answer": "4", "level": 2, "subject": "Algebra"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asks(count: int) -> list[dict]:
    return [{"question": f"What is {number}?", "answer": number} for number in range(count)]


def complaint(path: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        read_questions(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_full_row_keeps_all_its_parts(tmp_path: Path) -> None:
    row = {"id": 7, "question": " How many? ", "answer": "72", "level": "Level 3", "source": "mine", "solution": None}
    assert read_questions(write(tmp_path / "q.jsonl", row)) == [Question("7", "How many?", "72", 3, "mine")]


def test_ids_default_to_file_and_line_and_skip_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    content = '\ufeff{"question": "a?", "answer": 1}\r\n\r\n  \n{"question": "b?", "answer": 2.5}'
    path.write_text(content, encoding="utf-8", newline="")
    found = read_questions(str(path))
    assert [(q.id, q.answer) for q in found] == [("mine-00001", "1"), ("mine-00004", "2.5")]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (72, "72"),
        (-0.5, "-0.5"),
        ("1,234", "1,234"),
        ("48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72", "72"),
        ("a #### b\n#### 1,000 ", "1,000"),
        ("\\frac{3}{4}", "\\frac{3}{4}"),
    ],
)
def test_answers(answer: object, wanted: str, tmp_path: Path) -> None:
    assert read_questions(write(tmp_path / "q.jsonl", {"question": "?", "answer": answer}))[0].answer == wanted


def chat(*turns: tuple[str, str], **more: object) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (chat(("system", "s"), ("user", "old"), ("assistant", "1"), ("user", "q"), ("assistant", "Rome")), "q", "Rome"),
        (chat(("user", "q"), ("assistant", "So 8*9 = 72.\n\\boxed{72}")), "q", "72"),
        (chat(("user", "q"), answer=5), "q", "5"),
        (chat(("user", "q"), ("assistant", "no"), answer="yes"), "q", "yes"),
    ],
)
def test_messages(row: dict, question: str, answer: str, tmp_path: Path) -> None:
    found = read_questions(write(tmp_path / "q.jsonl", row))[0]
    assert (found.question, found.answer) == (question, answer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"Question": "a?", "answer": "1"},
            ["line 2", "no 'question'", "did you mean 'Question'?", "keys found: 'Question', 'answer'"],
        ),
        ({"question": "a?", "answr": "1"}, ["line 2", "no 'answer'", "did you mean 'answr'?"]),
        ({}, ["line 2", "keys found: none"]),
        ({"prompt": "a?", "completion": "1"}, ["line 2", "--traces", "question and answer"]),
        ({"question": "a?", "answer": ""}, ["line 2", "'answer'", "not empty"]),
        ({"question": "a?", "answer": None}, ["line 2", "'answer' is null"]),
        ({"question": "a?", "answer": True}, ["line 2", "'answer' is true"]),
        ({"question": "a?", "answer": float("nan")}, ["line 2", "'answer' is NaN"]),
        ({"question": "a?", "answer": "work ####"}, ["line 2", "nothing follows ####"]),
        ({"question": ["a?"], "answer": "1"}, ["line 2", "'question' is [\"a?\"]"]),
        ({"question": "a\ud800?", "answer": "1"}, ["line 2", "surrogate"]),
        ({"question": "a?", "answer": "1", "level": [1]}, ["line 2", "'level' is [1]"]),
        ({"question": "a?", "answer": "1", "level": 1.5}, ["line 2", "'level' is 1.5"]),
        ({"question": "a?", "answer": "1", "id": "first"}, ["line 2", "the id 'first'"]),
        (["a?", "1"], ["line 2", "a list, not an object"]),
        (None, ["line 2", "a NoneType, not an object"]),
        (chat(("assistant", "1")), ["line 2", "no user turn"]),
        (chat(("user", "a?")), ["line 2", "no assistant turn"]),
        (chat(("assistant", "1"), ("user", "a?")), ["line 2", "no assistant turn"]),
        ({"messages": "a?"}, ["line 2", "list of objects"]),
        ({"messages": [{"role": "user"}], "answer": "1"}, ["line 2", "no 'content'"]),
    ],
)
def test_wrong_rows_are_named(row: object, words: list[str], tmp_path: Path) -> None:
    first = {"id": "first", "question": "fine?", "answer": "1"}
    message = complaint(write(tmp_path / "q.jsonl", first, row))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"\n \n\n", ["empty"]),
        (b'{"question": "a?", "answer": "1"}\n{"question": "a?" "answer"}\n', ["line 2, column 19", "broken JSON"]),
        (b'{"question": "caf\xe9?", "answer": "1"}\n', ["line 1, byte 18", "UTF-8"]),
        ('{"question": "a?", "answer": "1"}\n'.encode("utf-16"), ["line 1, byte 1", "UTF-8"]),
        (b"[\n", ["line 1", "broken JSON"]),
        (b"9" * 5000, ["line 1", "unusable JSON"]),
        (b"[" * 200_000, ["line 1", "unusable JSON"]),
    ],
)
def test_wrong_files_are_named(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    message = complaint(path)
    assert [word for word in [str(path), *words] if word not in message] == []


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *asks(1))
    assert "did you mean 'train.jsonl'?" in complaint(tmp_path / "trian.jsonl")
    assert "no file" in complaint(tmp_path / "nowhere" / "q.jsonl")
    assert "is a folder" in complaint(tmp_path)
    assert "such as train.jsonl" in complaint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write(path, *asks(1))
    path.chmod(0)
    assert "cannot read" in complaint(path)


def test_a_sample_is_fixed_ordered_and_keeps_its_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *asks(50))
    drawn = read_questions(f"{path}#10")
    numbers = [int(q.answer) for q in drawn]
    assert len(set(numbers)) == 10
    assert numbers == sorted(numbers)
    assert numbers != list(range(10))
    assert drawn == read_questions(f"{path}#10")
    assert drawn[0] in read_questions(path)
    assert len(read_questions(f"{path}#1000")) == 50
    assert [q.answer for q in read_questions(f"{path}#10", limit=3)] == [str(n) for n in numbers[:3]]


@pytest.mark.parametrize("count", ["", "0", "-5", "many", "1.5", "²"])
def test_wrong_sample_sizes(count: str, tmp_path: Path) -> None:
    assert "#1000" in complaint(write(tmp_path / "q.jsonl", *asks(5)) + "#" + count)


def test_a_hash_in_a_file_name_is_a_name(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path / "part#2", *asks(5)))) == 5


def test_load_questions_reads_files_whatever_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *asks(5))
    assert load_questions(path, "train", None, 0) == load_questions(path, "test", None, 1) == read_questions(path)
    assert [q.answer for q in load_questions(path, "test", 2, 3)] == ["0", "1"]


def test_load_questions_generates_the_arithmetic_task() -> None:
    found = load_questions("arithmetic", "val", 20, 3)
    assert len(found) == 20
    assert found == load_questions("arithmetic", "val", 20, 3)
    assert found != load_questions("arithmetic", "val", 20, 4)


def test_unknown_tasks_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "holdout.jsonl", *asks(2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"unknown task 'arithmetics' \(did you mean 'arithmetic'\?\): .*gsm8k"):
        load_questions("arithmetics", "test", 5, 0)
    with pytest.raises(InputError, match=r"did you mean 'holdout\.jsonl'\?"):
        load_questions("holdout", "test", 5, 0)
    with pytest.raises(InputError, match=r"no file houldout\.jsonl \(did you mean 'holdout\.jsonl'\?\)"):
        load_questions("houldout.jsonl", "test", 5, 0)
    with pytest.raises(InputError, match=r"unknown split 'tests' \(did you mean 'test'\?\)"):
        load_questions("arithmetic", "tests", 5, 0)


def test_reading_questions_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'sympy'}"
    code = f"import sys, sbtiny.tasks.sources, sbtiny.tasks.verify; print({heavy} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "set()"
