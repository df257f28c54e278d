"""The ceiling and what is counted against it, for every way a text can fall into tokens."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sbtiny.budget.protocol import body_length, parse
from sbtiny.errors import InputError
from sbtiny.rollout.limits import HEAD_CHARS, AnswerSection, Limits, LimitTracker, Verdict

HEAD = "<budget>4</budget><solution>"
WORDS = ["a", "<", "</", "</sol", "ution>", "<budget>", "7", "</budget>", "><", "<solution>", ">a", " "]
WRAP = ("So", ": ")


def chopped(text: str, cuts: set[int]) -> list[str]:
    at = [0, *sorted(c for c in cuts if 0 < c < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(at) if a < b]


def play(pieces: list[str], limits: Limits, said: str = "") -> tuple[list[str], list[bool], LimitTracker, bool]:
    """What stands of the pieces, the wrap-up in its place: (pieces, injected, control, stopped)."""
    control, stands, injected = LimitTracker(limits, said), [], []
    for piece in pieces:
        verdict = control.check_token(piece)
        if verdict is Verdict.STOP:
            return stands, injected, control, True
        new = list(WRAP) if verdict is Verdict.WRAP_UP else [piece]
        if verdict is Verdict.WRAP_UP:
            assert [control.check_token(word, forced=True) for word in new] == [Verdict.GO] * len(new)
        stands, injected = stands + new, injected + [verdict is Verdict.WRAP_UP] * len(new)
    return stands, injected, control, False


def counted(pieces: list[str], said: str = "") -> int:
    parsed = parse(said + "".join(pieces))
    return body_length([said, *pieces], parsed) if parsed.start >= 0 and legal(said + "".join(pieces)) else len(pieces)


def legal(text: str) -> bool:
    return bool(re.match(r"\s*<budget>\s*0*[1-9][0-9]{0,5}\s*</budget>\s*<solution>", text))


@given(st.sets(st.integers(0, 80)), st.text("ab<>/solutin ", min_size=1, max_size=24))
def test_tags_are_seen_however_they_are_split(cuts: set[int], body: str) -> None:
    assume("</solution>" not in body)  # such a body ends there, and what follows makes the answer malformed: all of it counts
    text = f"{HEAD}x{body}</solution>"
    pieces = chopped(text, cuts)
    control = LimitTracker(Limits(ceiling=10_000))
    assert {control.check_token(piece) for piece in pieces} == {Verdict.GO}
    assert (control.section, control.budget) == (AnswerSection.AFTER, 4)
    assert control.used == body_length(pieces, parse(text))


@given(
    st.lists(st.sampled_from(WORDS), max_size=40),
    st.integers(0, 12),
    st.integers(3, 9),
    st.sampled_from(["", HEAD]),
)
def test_a_ceiling_is_never_passed_by_more_than_the_reserve(words: list[str], ceiling: int, reserve: int, said: str) -> None:
    stands, injected, control, _ = play(words, Limits(ceiling, None, (1, 2), reserve), said)
    assert counted(stands, said) <= max(ceiling + reserve, 0 if control.section is not AnswerSection.HEAD else len(stands))
    assert sum(injected) in (0, len(WRAP))
    assert [w for w, forced in zip(stands, injected, strict=True) if forced] == (list(WRAP) if any(injected) else [])


def test_the_token_over_the_ceiling_becomes_the_wrap_up() -> None:
    words = [HEAD, "a", "b", "c", "d", "e", "f", "g"]
    stands, injected, control, stopped = play(words, Limits(ceiling=2, wrap_up=(1, 2), reserve=4))
    assert stands == [HEAD, "a", "b", "So", ": ", "d", "e"]
    assert injected == [False, False, False, True, True, False, False]
    assert stopped
    assert control.wrapped_at is not None


def test_a_tag_that_closes_just_at_the_limit_is_let_through() -> None:
    words = [HEAD, "a", "b", "c", "d", "</", "sol", "ution>"]
    stands, injected, control, stopped = play(words, Limits(tolerance=0.0, wrap_up=(1, 2), reserve=4))
    assert (stands, any(injected), stopped, control.used) == (words, False, False, 4)


THOUGHT = "<budget>4</budget><think>"


@given(st.sets(st.integers(0, 80)), st.text("ab<>/think ", max_size=24), st.text("ab \n", max_size=9))
def test_thoughts_and_the_answer_behind_them_are_counted(cuts: set[int], thoughts: str, answer: str) -> None:
    assume("</think>" not in thoughts)
    text = f"{THOUGHT}x{thoughts}</think>{answer}y"
    pieces = chopped(text, cuts)
    control = LimitTracker(Limits(ceiling=10_000))
    assert {control.check_token(piece) for piece in pieces} == {Verdict.GO}
    assert (control.section, control.used) == (AnswerSection.AFTER, body_length(pieces, parse(text)))


def test_the_answer_has_the_reserve_to_itself() -> None:
    words = [THOUGHT, "a", "b", "</think>", "c", "d", "e", "f", "g"]
    stands, injected, _, stopped = play(words, Limits(ceiling=2, wrap_up=(1, 2), reserve=3))
    assert (stands, any(injected), stopped) == ([THOUGHT, "a", "b", "</think>", "c", "d", "e"], False, True)


def test_what_only_began_like_the_tag_is_charged_to_the_reserve() -> None:
    words = [HEAD, "a", "</", "sol", "o", "b", "c", "d", "e"]
    stands, _, _, stopped = play(words, Limits(ceiling=1, wrap_up=(1, 2), reserve=6))
    assert stands == [HEAD, "a", "</", "sol", "So", ": ", "b", "c"]
    assert stopped
    assert counted(stands) == 7


@pytest.mark.parametrize(
    ("head", "budget", "place"),
    [
        (HEAD, 4, AnswerSection.BODY),
        (" <budget> 007 </budget>\n<solution>", 7, AnswerSection.BODY),
        ("Let us see", None, AnswerSection.LOOSE),
        ("Hm <budget>4</budget><solution>", None, AnswerSection.LOOSE),
        ("<budget>0</budget><solution>", None, AnswerSection.LOOSE),
        ("<budget>few</budget><solution>", None, AnswerSection.LOOSE),
        ("<budget>-4</budget><solution>", None, AnswerSection.LOOSE),
        ("<budget>99999999</budget><solution>", None, AnswerSection.LOOSE),
        ("<budget>4</budget><budget>9</budget><solution>", 4, AnswerSection.LOOSE),
        ("<budget>4</budget> is it <solution>", 4, AnswerSection.LOOSE),
        ("<solution>", None, AnswerSection.LOOSE),
        ("<budget>4</budget>" + " " * HEAD_CHARS, 4, AnswerSection.LOOSE),
        ("<budget>" + "0" * HEAD_CHARS, None, AnswerSection.LOOSE),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_head_has_a_defined_outcome(head: str, budget: int | None, place: AnswerSection, size: int) -> None:
    control = LimitTracker(Limits(ceiling=10_000))
    for start in range(0, len(head), size):
        assert control.check_token(head[start : start + size]) is Verdict.GO
    assert (control.budget, control.section) == (budget, place)


def test_a_second_budget_in_the_body_changes_nothing() -> None:
    words = [HEAD, "a", "<budget>", "900", "</budget>", "b", "c"]
    stands, _, control, _ = play(words, Limits(tolerance=0.0, wrap_up=(1, 2), reserve=9))
    assert stands == [HEAD, "a", "<budget>", "900", "</budget>", "So", ": ", "c"]
    assert control.budget == 4


def test_the_lower_limit_counts() -> None:
    limits = Limits(ceiling=100, tolerance=0.5)
    assert [limits.allowed(b) for b in (None, 10, 1000)] == [100, 15, 100]
    assert Limits(tolerance=0.5).allowed(None) is None


def test_without_a_wrap_up_the_answer_just_ends() -> None:
    assert play([HEAD, "a", "b"], Limits(ceiling=1))[0] == [HEAD, "a"]


def test_rambling_after_the_body_stops_without_wrap_up() -> None:
    stands, injected, _, stopped = play([HEAD, "a", "</solution>", "b", "c"], Limits(ceiling=3, wrap_up=(1, 2), reserve=5))
    assert (stands, any(injected), stopped) == ([HEAD, "a", "</solution>", "b"], False, True)


@pytest.mark.parametrize(
    "wrong",
    [{"ceiling": -1}, {"tolerance": -0.1}, {"tolerance": math.inf}, {"reserve": -1}, {"wrap_up": (1, 2), "reserve": 2}],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Limits(**wrong)


@given(st.lists(st.sampled_from(WORDS), max_size=40), st.integers(0, 12), st.booleans(), st.sampled_from(["<think>", "<solution>"]))
def test_no_limit_is_passed_before_the_token_that_is_foretold(words: list[str], ceiling: int, wraps: bool, opening: str) -> None:
    limits = Limits(ceiling, None, (1, 2), 9) if wraps else Limits(ceiling)
    control, foretold = LimitTracker(limits, "<budget>4</budget>" + opening), 0
    for i, word in enumerate([*words, *("a" * 40)]):
        earliest = i - 1 + control.tokens_until_over
        assert earliest >= foretold  # what was asked for before does not go too far
        foretold = earliest
        if control.check_token(word) is not Verdict.GO:
            assert i >= foretold
            break
    else:
        pytest.fail("the limit was never passed")


def test_the_token_that_makes_a_head_malformed_is_judged_by_the_budget_before_it() -> None:
    """Its tokens all count from here on, and without a ceiling no limit was known before."""
    control = LimitTracker(Limits(tolerance=0.0))
    verdicts = [control.check_token(piece) for piece in ("<budget>2</budget>", " ", " ", "<budget>")]
    assert verdicts == [Verdict.GO, Verdict.GO, Verdict.GO, Verdict.STOP]


@pytest.mark.parametrize("ceiling", [40, None])
@pytest.mark.parametrize("words", [(" The", " answer"), ("<budget>", "3")], ids=str)
def test_what_is_wrapped_up_in_its_head_has_the_reserve_and_no_second_wrap_up(ceiling: int | None, words: tuple[str, ...]) -> None:
    pieces = ["<budget>", "2", "</budget>", *words, *(["a"] * 80)]
    stands, injected, control, stopped = play(pieces, Limits(ceiling, 0.5, (1, 2), 12))
    assert injected == [False, False, False, True, True, *[False] * 10]
    assert (len(stands), stopped, control.wrapped_at) == (3 + 12, True, 3)


def test_thoughts_that_may_not_open_are_not_wrapped_up() -> None:
    control = LimitTracker(Limits(ceiling=0, wrap_up=(1,), reserve=9, thoughts_wrap_up=(2,)), "<budget>4</budget>")
    assert control.check_token("<think>So") is Verdict.WRAP_UP
    assert (control.section, control.wrap_up) == (AnswerSection.HEAD, (1,))
