import os
import sys
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbtiny.errors import InputError
from sbtiny.tasks import user_verifier, verify
from sbtiny.tasks.sources import Question, parse_question, read_questions
from sbtiny.tasks.traces import read_traces
from sbtiny.tasks.verify import Verifier, auto, choice, exact, load_verifier, math, numeric, regex

DATA = Path(os.environ.get("SBTINY_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder of public maths data (SBTINY_DATA)")


def ask(answer: str) -> Question:
    return Question("q1", "How many?", answer)


def boxed(answer: str) -> str:
    return f"Let me see.\n\nThe result is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("\\boxed{72 \\text{ clips}}", "72", True),
        ("\\boxed{72}", "72.0", True),
        ("\\boxed{0.5}", "1/2", True),
        ("\\boxed{50\\%}", "50", True),
        ("\\boxed{1,234}", "1234", True),
        ("\\boxed{3}", "3.0000000000000000000001", False),
        ("\\boxed{3 \\pi}", "3", False),
        ("\\boxed{3, 5}", "5", False),
        ("72 \\boxed{5}", "72", False),
        ("The answer is 18 / 3 = 6 eggs a day.", "6", True),
        ("The answer is therefore 72 clips.", "72", True),
        ("The answer is 3 or 5.", "3", False),
        ("The answer is 3 or 5.", "5", False),
        ("48+24 = <<48+24=72>>72\nA: 72", "72", True),
        ("I do not know.", "72", False),
        ("", "0", False),
    ],
)
def test_numeric(response: str, answer: str, verdict: bool) -> None:
    assert numeric(response, ask(answer)) is verdict


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("\\boxed{B}", "B", True),
        ("\\boxed{\\text{(B)}}", "B", True),
        ("\\boxed{\\text{(B)}}", "\\text{(B)}", True),
        ("\\boxed{b}", "B", True),
        ("The answer is (C) because 2 < 3.", "C", True),
        ("Answer: D) Paris", "D", True),
        ("(A) is wrong.\nE", "E", True),
        ("(A) is wrong, so it must be (C), clearly", "C", True),
        ("Answer: Berlin", "B", False),
        ("The answer is A", "B", False),
        ("A cat sat on the mat.", "A", False),
        ("I take\nC) Paris", "C", True),
        ("", "A", False),
    ],
)
def test_choice(response: str, answer: str, verdict: bool) -> None:
    assert choice(response, ask(answer)) is verdict


def test_exact_and_regex() -> None:
    assert exact("thinking\n\nThe answer is  New   york.", ask("New York"))
    assert exact("new york", ask("New York"))
    assert exact("Some thought.\nNew York", ask("New York"))
    assert not exact("New York City", ask("New York"))
    assert regex("\\boxed{colour}", ask("colou?r"))
    assert not regex("\\boxed{colours}", ask("colou?r"))


def test_a_pattern_in_brackets_stays_a_pattern() -> None:
    """As a formula it would lose them."""
    question = parse_question({"question": "Which?", "answer": r"\(B\)"}, "here", "a")
    assert question.answer == "B"
    assert regex("So it is\n(B)", question)
    assert not regex("So it is\nB", question)
    solved = parse_question({"question": "Which?", "answer": "It is a colour.\n#### colou?r"}, "here", "a")
    assert regex("\\boxed{color}", solved)


CASES = [line.split("\t") for line in Path(__file__).with_name("answers.tsv").read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize(("reference", "response", "wanted"), CASES)
def test_auto_judges_as_a_teacher_would(reference: str, response: str, wanted: str) -> None:
    assert auto(response, ask(reference)) is (wanted == "right")


@pytest.mark.parametrize(("reference", "response", "wanted"), CASES[::5])
def test_a_verdict_does_not_depend_on_what_was_judged_before(reference: str, response: str, wanted: str) -> None:
    auto("\\boxed{x + 1}", ask("1 + x"))
    assert auto(response, ask(reference)) is auto(response, ask(reference)) is (wanted == "right")


@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        ("72", "\\boxed{72}", True),
        ("72", "\\boxed{73}", False),
        ("72", "The answer is 72 clips.", True),
        ("72", "\\boxed{72 \\text{ dozen}}", False),
        ("72", "\\boxed{72 \\text{ is impossible}}", False),
        ("72", "\\boxed{1, 72}", False),
        ("72", "\\boxed{x > 72}", False),
        ("72", boxed("7^" * 200 + "7"), False),
        ("72", "\\boxed{\\textcolor{blue}{72}}", True),
        ("72", "I do not know.", False),
        ("72", "", False),
        ("\\frac{1}{3}", "\\boxed{0.\\overline{3}}", True),
        ("x+1", "\\boxed{x + 1}", True),
        ("x+1", "\\boxed{7 \\text{ apples or so, whatever}}", False),
        ("1101_2", "\\boxed{1101_3}", False),
        ("\\text{east}", "\\boxed{\\text{west}}", False),
        ("True", "\\boxed{true}", True),
        ("B", "**B**", True),
        ("x+1", "", False),
    ],
)
def test_what_a_plain_reading_settles_starts_no_process(
    reference: str, response: str, verdict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "math_process", lambda pid: pytest.fail("math-verify was asked"))
    assert auto(response, ask(reference)) is verdict


def test_a_formula_for_a_number_is_wrong_where_math_verify_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert auto("\\boxed{\\sqrt{16}}", ask("4")) is False
    assert auto("\\boxed{4}", ask("4")) is True


@pytest.mark.parametrize(("verifier", "answer"), [(numeric, "x+1"), (choice, "Paris"), (regex, "(")])
def test_a_reference_that_does_not_fit_is_an_input_error(verifier: Verifier, answer: str) -> None:
    with pytest.raises(InputError, match=r"question q1: .* use --verifier"):
        verifier("1", ask(answer))


PIECES = r"(answer is|####|\\boxed\{|[0-9.,/eE$%^{}()=*\\ -]|\\d?frac|\\text\{|km|\n)*"


@given(st.text() | st.from_regex(PIECES, fullmatch=True))
@settings(max_examples=500, deadline=None)
def test_numeric_and_choice_take_any_text(text: str) -> None:
    assert numeric(text, ask("72")) in (True, False)
    assert choice(text, ask("A")) in (True, False)
    assert exact(text, ask("x")) in (True, False)


class NoAlgebra:
    def same(self, name: str, reference: str, answer: str) -> bool:
        return False


LATEX = r"(answer is|\\\\boxed\{|\\\\text(color)?\{|\\\\overline|[0-9.,;/eExB%^_{}()\[\]=<>*\\\\ +-]|\\\\frac|and|²|½|３|√|\n)*"


@given(st.text() | st.from_regex(LATEX, fullmatch=True), st.sampled_from(["72", "1/3", "B", "x+1", "1101_2", "[1,2]", "Yes"]))
@settings(max_examples=500, deadline=None)
def test_auto_takes_any_text(text: str, reference: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "math_process", lambda pid: NoAlgebra())
        first = auto(text, ask(reference)), auto(boxed(text), ask(reference))
        assert first == (auto(text, ask(reference)), auto(boxed(text), ask(reference)))
        assert not any(first) or any(sign.isalnum() for sign in text)


@given(st.text() | st.from_regex(LATEX, fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_a_reference_may_be_any_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "math_process", lambda pid: NoAlgebra())
        assert not auto("\\boxed{4071.5}", ask(text)) or "4071" in text


@given(st.fractions(), st.sampled_from(["{}", "{}.", "${}$", " {} apples", "x = {}", "**{}**"]))
def test_every_fraction_is_read_back_exactly(value: Fraction, form: str) -> None:
    assert numeric(boxed(form.format(value)), ask(str(value)))
    assert not numeric(boxed(form.format(value + 1)), ask(str(value)))


@pytest.mark.parametrize(
    "text",
    [
        "9" * 200_000, "1,234," * 30_000, "\\boxed{" * 30_000, "{" * 200_000, "\\" * 200_000, "answer" + " " * 200_000,
        "answer is " * 20_000, "#### x\n" * 20_000, "answer:\n" * 20_000, "\\frac{1}" * 20_000, "-" * 200_000,
        "$" * 200_000, "*" * 200_000, "####" * 50_000, "(A)" * 50_000, "\\boxed{1} and " * 15_000, "B or " * 40_000,
        "option is " * 20_000, "A" + " " * 200_000 + "is", "(" * 200_000, "answer is " + "$" * 200_000, "answer is " + "(" * 200_000,
        "answer is B" + ")" * 200_000, "answer is " + "{" * 200_000, boxed("{" * 99_999 + "5" + "}" * 99_999),
        boxed("{" * 140 + "5" + "}" * 140), boxed("\\text{" * 40 + "5" + "}" * 40), boxed("x" * 290), boxed("{" * 290),
        boxed("5 " + "hundred " * 35), boxed("0.\\overline{" + "3" * 280 + "}"), boxed("1" + " 000" * 70), boxed("\\frac" * 55),
        boxed("{" * 450 + "x" + "}" * 450), boxed("f(" * 400 + "," + ")" * 400), boxed("x = " * 240 + "1"), boxed("a " * 480),
        boxed("5 " + "a " * 140 + "!"), boxed("5 " + "a" * 280 + "!"), boxed("1" + "^2" * 140 + "!"), boxed("=" * 280),
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
@pytest.mark.parametrize("verifier", [numeric, choice, exact, auto, math])
def test_long_texts_take_no_long_time(verifier: Verifier, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "math_process", lambda pid: NoAlgebra())
    begin = time.monotonic()
    verifier(text, ask({numeric: "5", auto: "5", math: "x+1"}.get(verifier, "A")))
    assert time.monotonic() - begin < 2


def test_load_verifier_by_name() -> None:
    assert load_verifier(None) is load_verifier("auto") is auto
    assert load_verifier("numeric") is numeric
    with pytest.raises(InputError, match=r"unknown verifier 'numerik' \(did you mean 'numeric'\?\): choose from auto"):
        load_verifier("numerik")


@needs_data
@pytest.mark.parametrize("name", ["gsm8k_test_a", "math500_a", "svamp"])
def test_auto_on_real_questions(name: str) -> None:
    questions = read_questions(str(DATA / f"{name}.jsonl"), limit=200)
    assert len(questions) == 200
    assert [q.answer for q in questions if not auto(boxed(q.answer), q)] == []
    assert [q.answer for q in questions if auto(boxed("-123.75"), q)] == []
    accepted = {(a.answer, b.answer) for a, b in pairwise(questions) if auto(boxed(b.answer), a)}
    assert {pair for pair in accepted if pair[0] != pair[1]} == set()


@needs_data
def test_numeric_agrees_with_the_published_verdicts() -> None:
    """All 2596 did when this was written."""
    traces = read_traces(str(DATA / "traces_gsm8k_openai_short_a.jsonl"))
    verdicts = [numeric(t.response, Question(t.id, t.question, t.answer)) for t in traces]
    agreed = sum(verdict is trace.correct for verdict, trace in zip(verdicts, traces, strict=True))
    assert agreed / len(traces) >= 0.999


def test_a_pattern_that_never_ends_is_stopped_and_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(user_verifier, "TIMEOUT_S", 0.2)
    started = time.perf_counter()
    assert regex("\\boxed{" + "a" * 60 + "b}", ask("(a+)+")) is False
    assert time.perf_counter() - started < 5
    told = capsys.readouterr().err
    assert told == "question q1: its regular expression took longer than 0.2 s; counted as wrong\n"
    assert regex("\\boxed{aaa}", ask("(a+)+")) is True
