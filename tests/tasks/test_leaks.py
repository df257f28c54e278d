"""An evaluation question is found in training however it is written, and another one is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.config import EvalSettings, Settings
from sbtiny.errors import InputError
from sbtiny.tasks import arithmetic
from sbtiny.tasks.leaks import drop_eval_questions, hash_question, leave_out
from sbtiny.tasks.sources import Question

ASKED = "Tom has 3 coins, and finds 1,000 more.\nHow many coins?"


def q(text: str) -> Question:
    return Question("q", text, "7")


def drop(items: list[Question], task: str, split: str, seed: int = 0) -> tuple[list[Question], int]:
    return drop_eval_questions(items, "mine.jsonl", Settings(eval=EvalSettings(task=task, split=split), seed=seed))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "again",
    [
        ASKED,
        "  tom has 3 coins and finds 1,000 more. How many coins ?",
        "TOM HAS 3 COINS\u2014and finds 1,000 more! \u201cHow many coins?\u201d",
        "Tom has \uff13 coins, and finds 1,000 more. How many coins?",
    ],
)
def test_the_same_question_written_otherwise_is_the_same(again: str) -> None:
    assert hash_question(again) == hash_question(ASKED)


@pytest.mark.parametrize("other", ["Tom has 4 coins, and finds 1,000 more. How many coins?", ASKED + " Why?", "3 - 1?", "Tom"])
def test_other_numbers_words_and_signs_are_another_question(other: str) -> None:
    assert hash_question(other) != hash_question(ASKED)
    assert hash_question("3 + 1?") != hash_question("3 - 1?")


def test_what_is_evaluated_is_taken_out_and_told_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [replace(q(ASKED), where=f"mine.jsonl, line {n}") for n in range(1, 8)]
    kept = leave_out(
        [q("one"), asked[0], q("two")], [q(ASKED.upper())], "an evaluation question of held.jsonl", "evaluation questions of held.jsonl"
    )
    assert [item.question for item in kept] == ["one", "two"]
    assert leave_out([q("one")], [q(ASKED)], "an evaluation question of held.jsonl", "evaluation questions of held.jsonl") == [q("one")]
    assert said(capsys) == "evaluation questions of held.jsonl left out: 1; mine.jsonl, line 1"
    leave_out([q("one"), *asked], [q(ASKED)], "an evaluation question of held.jsonl", "evaluation questions of held.jsonl")
    report = said(capsys)
    assert report.startswith("evaluation questions of held.jsonl left out: 7; mine.jsonl, line 1; ")
    assert report.endswith("mine.jsonl, line 5; ...")
    with pytest.raises(InputError, match=r"every question is an evaluation question of held\.jsonl"):
        leave_out([q(ASKED)], [q(ASKED)], "an evaluation question of held.jsonl", "evaluation questions of held.jsonl")


def test_a_set_of_the_hub_that_is_not_at_hand_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    assert drop([q("one")], "gsm8k", "test") == ([q("one")], 0)
    assert said(capsys).startswith("not compared with the evaluation questions of gsm8k: cannot get openai/gsm8k")


def test_a_file_of_evaluation_questions_that_is_missing_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        drop([q("one")], str(tmp_path / "none.jsonl"), "test")
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"question": "One!", "answer": "1"}) + "\n")
    for split in ("test", "val", "train"):  # a file is used whole, whatever the split
        assert drop([q("one"), q("two")], str(held), split) == ([q("two")], 1)


def test_evaluating_a_named_set_on_its_training_split_is_on_purpose() -> None:
    asked = arithmetic.generate_questions("train", 3)
    assert drop(asked, "arithmetic", "train") == (asked, 0)
    held = arithmetic.generate_questions("test", 3, seed=9)
    assert drop([*asked, *held], "arithmetic", "test", seed=9) == (asked, 3)


def test_named_sets_that_are_on_this_machine_are_compared_with_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    asked: list[tuple] = []

    def cached(path: str, *_: object, split: str, **__: object) -> list[dict]:
        asked.append((path, split))
        return [{"problem": ASKED, "answer": "7"}]

    monkeypatch.setattr("datasets.load_dataset", cached)
    items = [q("one"), q(ASKED)]
    assert drop(items, "arithmetic", "test") == (items, 0)
    assert asked == []
    (tmp_path / "HuggingFaceH4___math-500").mkdir()
    (tmp_path / "RUC-AIBOX___still-3-preview-rl-data").mkdir()  # has no test split
    assert drop(items, "arithmetic", "test") == ([q("one")], 1)
    assert asked == [("HuggingFaceH4/MATH-500", "test")]
    assert said(capsys) == "evaluation questions of math500 left out: 1"
