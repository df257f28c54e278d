"""The text of an answer as it comes: the same parts however it is split, and never a piece of a tag."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.protocol import parse
from sbtiny.budget.stream import AnswerSplitter

WORDS = ["a", "<", "</", "budget", ">", "<budget>", "7", "</budget>", "<solution>", "</solution>", "<think>", "</think>", " ", "\n", "é"]


def split(pieces: list[str], prefill: str = "") -> tuple[int | None, str, str]:
    """(budget, thoughts, answer)"""
    splitter = AnswerSplitter(prefill)
    parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.close()
    return splitter.budget, *("".join(p.text for p in parts if p.kind == kind) for kind in ("thoughts", "answer"))


@pytest.mark.parametrize(
    ("text", "budget", "thoughts", "answer"),
    [
        ("<budget>12</budget><solution>a<b</solution>", 12, "", "a<b"),
        ("<budget>12</budget><solution>\na", 12, "", "a"),
        ("<budget>12</budget><think>\nhm\n</think>\n\nok", 12, "hm\n", "ok"),
        ("<budget>12</budget><think>hm</th", 12, "hm", ""),
        ("<budget>12</budget>", 12, "", ""),
        ("<budget>1", None, "", ""),
        ("Hello <b>", None, "", "Hello <b>"),
        ("<think>x</think>y", None, "x", "y"),
        ("<budget>0</budget><solution>x", None, "", "<budget>0</budget><solution>x"),
        ("", None, "", ""),
    ],
)
def test_parts_of_an_answer(text: str, budget: int | None, thoughts: str, answer: str) -> None:
    for size in (1, 3, 99):
        assert split([text[i : i + size] for i in range(0, len(text), size)]) == (budget, thoughts, answer)


def test_prefilled_text_is_read_but_not_shown() -> None:
    assert split(["a", "</solu", "tion>"], "<budget>3</budget><solution>") == (3, "", "a")
    assert split(["a", "</think>b"], "<budget>3</budget><think>") == (3, "a", "b")
    assert split(["a", "</think>b"], "<think>") == (None, "a", "b")  # a chat template may open the thoughts


@given(st.lists(st.sampled_from(WORDS), max_size=30))
def test_a_well_formed_answer_is_split_as_it_is_parsed(words: list[str]) -> None:
    for head in ("<budget>7</budget><solution>", "<budget>7</budget><think>"):
        text = head + "".join(words)
        parsed = parse(text)
        splitter = AnswerSplitter()
        parts = [part for piece in [head, *words] for part in splitter.feed(piece)] + splitter.close()
        shown = {kind: "".join(p.text for p in parts if p.kind == kind) for kind in ("thoughts", "answer")}
        if parsed.ok:
            thoughts, answer = (parsed.body, parsed.answer) if parsed.answer is not None else ("", parsed.body)
            assert (splitter.budget, shown["thoughts"], shown["answer"]) == (7, thoughts.lstrip(), answer.lstrip())
            tags = [p.text for p in parts if "</solution" in p.text or "<budget" in p.text]
            assert not [t for t in tags if t not in thoughts + answer]
