"""An evaluation question is found in training however it is written, and another one is not."""

import json
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks.leaks import apart, fingerprint, without_heldout
from sbtiny.tasks.sources import Question

ASKED = "Tom has 3 coins, and finds 1,000 more.\nHow many coins?"


def q(text: str) -> Question:
    return Question("q", text, "7")


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
    assert fingerprint(again) == fingerprint(ASKED)


@pytest.mark.parametrize(
    "other", ["Tom has 4 coins, and finds 1,000 more. How many coins?", ASKED + " Why?", "3 - 1?", "Tom"]
)
def test_other_numbers_words_and_signs_are_another_question(other: str) -> None:
    assert fingerprint(other) != fingerprint(ASKED)
    assert fingerprint("3 + 1?") != fingerprint("3 - 1?")


def test_what_is_evaluated_is_taken_out_and_counted() -> None:
    kept, leaked = apart([q("one"), q(ASKED), q("two")], [q(ASKED.upper())], "held.jsonl")
    assert ([item.question for item in kept], leaked) == (["one", "two"], 1)
    with pytest.raises(InputError, match=r"every question is an evaluation question of held\.jsonl"):
        apart([q(ASKED)], [q(ASKED)], "held.jsonl")


def test_a_set_of_the_hub_that_is_not_at_hand_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    assert without_heldout([q("one")], "gsm8k", "test", said.append) == ([q("one")], 0)
    assert said[0].startswith("not compared with the evaluation questions of gsm8k: cannot get openai/gsm8k")


def test_a_file_of_evaluation_questions_that_is_missing_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        without_heldout([q("one")], str(tmp_path / "none.jsonl"), "test", print)
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"question": "One!", "answer": "1"}) + "\n")
    assert without_heldout([q("one"), q("two")], str(held), "test", print) == ([q("two")], 1)
