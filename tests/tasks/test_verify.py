import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbtiny.errors import InputError
from sbtiny.tasks import verify
from sbtiny.tasks.sources import Question, read_questions, read_traces
from sbtiny.tasks.verify import auto, choice, exact, final_answer, load_verifier, math, numeric, parse_number, regex

DATA = Path(os.environ.get("SBTINY_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder of public maths data (SBTINY_DATA)")


def ask(answer: str) -> Question:
    return Question("q1", "How many?", answer)


def boxed(answer: str) -> str:
    return f"Let me see.\n\nThe result is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{72}.", "72"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\fbox{5}", "5"),
        ("\\\\boxed{5}", "5"),
        ("\\boxed{ \\{1, 2\\} }", "\\{1, 2\\}"),
        ("a stray { or } then \\boxed{3} and }", "3"),
        ("\\boxed{4} then \\boxed{}", "4"),
        ("\\boxed{4} then \\boxed{12", "4"),
        ("\\boxed{7} #### 8", "7"),
        ("work\n#### 1,234", "1,234"),
        ("work\n#### yes", "yes"),
        ("#### Step 1: add\nThe answer is 6", "6"),
        ("#### 5\nThe answer is 6", "5"),
        ("The answer is 6.", "6"),
        ("The answer is 6. Then 7 more.", "6"),
        ("Answer: 1\nAnswer: **2**", "2"),
        ("**Answer:** $3.50", "$3.50"),
        ("Final answer:\n\n12", "12"),
        ("the answer is 9</solution>", "9"),
        ("the answer is 9<|im_end|>", "9"),
        ("My answer is correct. Total 18.", "18"),
        ("40 + 2 makes 42 eggs.", "42"),
        ("10-5 is 5, and 5-7 = -2", "-2"),
        ("from −3", "-3"),
        ("costs $1,234.50.", "$1,234.50"),
        ("half: \\frac{1}{2}", "\\frac{1}{2}"),
        ("or 3/4.", "3/4"),
        ("nothing here", None),
        ("", None),
        ("\\boxed{", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


NUMBERS = {
    "72": 72,
    "72 clips": 72,
    "72.": 72,
    "+5": 5,
    "-5": -5,
    "−5": -5,
    "- 5": -5,
    "$5.00": 5,
    "-$5": -5,
    "\\$ 1500": 1500,
    "€1,234.5": "1234.5",
    "1,234": 1234,
    "1{,}234": 1234,
    "10,\\!080": 10080,
    "11,\\! 111,\\! 111,\\! 100": 11111111100,
    "50%": 50,
    "50\\%": 50,
    "50 percent": 50,
    ".5": "1/2",
    "0.1": "1/10",
    "3/4": "3/4",
    "-3/4": "-3/4",
    "6/8": "3/4",
    "\\frac{3}{4}": "3/4",
    "\\dfrac{-3}{4}": "-3/4",
    "-\\frac 59": "-5/9",
    "\\frac9{19}": "9/19",
    "\\frac{29}4": "29/4",
    "1 1/2": "3/2",
    "-10\\frac{1}{12}": "-121/12",
    "1e3": 1000,
    "1.5e-3": "3/2000",
    "1.5 \\times 10^{3}": 1500,
    "2×10^2": 200,
    "5 km/h": 5,
    "5km": 5,
    "20 miles per hour": 20,
    "15\\mbox{ cm}^2": 15,
    "9\\text{ values}": 9,
    "1.85\\ \\text{USD}": "1.85",
    "90^\\circ": 90,
    "90^{\\circ}": 90,
    "12^{\\text{th}}\\text{ grade}": 12,
    "3 million": 3_000_000,
    "$1.5 billion dollars": 1_500_000_000,
    "x=5": 5,
    "k = \\frac{-33}{2}": "-33/2",
    "x = 9/3 = 3": 3,
    "18 / 3 = 6": 6,
    "\\text{Total} = 18": 18,
    "**72**": 72,
    "\\(72\\)": 72,
    "$72$": 72,
    "-0": 0,
}
NOT_NUMBERS = [
    "", "five", "-", ".", "1,23", "1 234", "3, 5", "3 or 5", "3 and 5", "3x", "5xy", "3i", "3\\pi", "3\\sqrt{2}",
    "18+2\\pi", "2^{10}", "2**10", "5!", "3:30", "7 - 2", "--5", "1/0", "\\frac{1}{0}", "40_9", "1_000", "0x10",
    "inf", "nan", "5e", "٣", "²", "1e999999999", "1e-999999999", "9" * 5000, "1,-2", "(3, 4)", "x \\neq 5",
    "x >= 5", "2x = 10", "AB=9, CD=4", "49x^2 - 42xy = 0", "x + y + z = 0",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text: str) -> None:
    assert parse_number(text) == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_not_numbers(text: str) -> None:
    assert parse_number(text) is None


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


@pytest.mark.parametrize(("verifier", "answer"), [(numeric, "x+1"), (choice, "F"), (regex, "(")])
def test_a_reference_that_does_not_fit_is_an_input_error(verifier: verify.Verifier, answer: str) -> None:
    with pytest.raises(InputError, match=r"question q1: .* use --verifier"):
        verifier("1", ask(answer))


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("\\boxed{1+x}", "x+1", True),
        ("\\boxed{\\frac{\\sqrt{3}}{3}}", "\\frac{1}{\\sqrt 3}", True),
        ("\\boxed{(x-2)(x+2)}", "x^2-4", True),
        ("\\boxed{-2, 1}", "1,-2", True),
        ("\\boxed{\\left(3,\\ \\frac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("So the answer is \\( (a + 5)(b + 2) \\).", "(a+5)(b+2)", True),
        ("\\boxed{0.75}", "\\frac{3}{4}", True),
        ("\\boxed{x+2}", "x+1", False),
        ("\\boxed{(3, 4)}", "(4, 3)", False),
        ("\\boxed{[3, 4]}", "(3, 4)", False),
        ("\\boxed{\\text{west}}", "\\text{east}", False),
        ("\\boxed{__import__('os').system('true')}", "x+1", False),
        ("no idea", "x+1", False),
        ("\\boxed{" + "x+" * 2000 + "1}", "x+1", False),
    ],
)
def test_math(response: str, answer: str, verdict: bool) -> None:
    assert math(response, ask(answer)) is verdict


@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", "(10^8)!", "\\sum_{k=1}^{10^9} k^{k}", "10^{10^{10}} + x"])
def test_math_survives_hostile_answers(
    hostile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert math("\\boxed{1+x}", ask("x+1"))  # the process is up
    monkeypatch.setattr(verify, "MATH_SECONDS", 0.5)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert not math(boxed(hostile), ask("x+1"))
    assert time.monotonic() - begin < 5
    assert "counted as wrong" in caplog.text
    monkeypatch.undo()
    assert math("\\boxed{1+x}", ask("x+1"))


def test_math_works_in_many_threads() -> None:
    verdicts: dict[int, bool] = {}

    def check(number: int) -> None:
        verdicts[number] = math(f"\\boxed{{{number}+x}}", ask(f"x+{number // 2 * 2}"))

    threads = [threading.Thread(target=check, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert verdicts == {number: number % 2 == 0 for number in range(8)}


def test_the_comparing_process_ends_with_its_parent() -> None:
    code = """
import os
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import math, math_process
assert math("\\\\boxed{1+x}", Question("q", "?", "x+1"))
print(math_process(os.getpid()).process.pid)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(told.stdout)
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)
    assert told.stderr == ""


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # nobody may be there to collect a dead orphan
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_math_without_its_package_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=re.escape("pip install 'sbtiny[tasks]'")):
        auto("\\boxed{x}", ask("x"))
    assert auto("\\boxed{5}", ask("5"))


PIECES = r"(answer is|####|\\boxed\{|[0-9.,/eE$%^{}()=*\\ -]|\\d?frac|\\text\{|km|\n)*"


@given(st.text() | st.from_regex(PIECES, fullmatch=True))
@settings(max_examples=500, deadline=None)
def test_numeric_and_choice_take_any_text(text: str) -> None:
    assert numeric(text, ask("72")) in (True, False)
    assert choice(text, ask("A")) in (True, False)
    assert exact(text, ask("x")) in (True, False)


@given(st.fractions(), st.sampled_from(["{}", "{}.", "${}$", " {} apples", "x = {}", "**{}**"]))
def test_every_fraction_is_read_back_exactly(value: Fraction, form: str) -> None:
    assert numeric(boxed(form.format(value)), ask(str(value)))
    assert not numeric(boxed(form.format(value + 1)), ask(str(value)))


@pytest.mark.parametrize(
    "text",
    [
        "9" * 200_000, "1,234," * 30_000, "\\boxed{" * 30_000, "{" * 200_000, "\\" * 200_000, "answer" + " " * 200_000,
        "answer is " * 20_000, "#### x\n" * 20_000, "answer:\n" * 20_000, "\\frac{1}" * 20_000, "-" * 200_000,
        "$" * 200_000, "*" * 200_000, "####" * 50_000, "(A)" * 50_000,
        boxed("5 " + "a " * 140 + "!"), boxed("5 " + "a" * 280 + "!"), boxed("1" + "^2" * 140 + "!"), boxed("=" * 280),
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
@pytest.mark.parametrize("verifier", [numeric, choice, exact])
def test_long_texts_take_no_long_time(verifier: Callable[[str, Question], bool], text: str) -> None:
    begin = time.monotonic()
    verifier(text, ask("5" if verifier is numeric else "A"))
    assert time.monotonic() - begin < 2


def test_load_verifier_by_name() -> None:
    assert load_verifier(None) is load_verifier("auto") is auto
    assert load_verifier("numeric") is numeric
    with pytest.raises(InputError, match=r"unknown verifier 'numerik' \(did you mean 'numeric'\?\): choose from auto"):
        load_verifier("numerik")


def own(folder: Path, body: str) -> str:
    path = folder / "my.py"
    path.write_text(body)
    return f"{path}:check"


def test_own_verifier(tmp_path: Path) -> None:
    spec = own(tmp_path, "def check(response, question, answer):\n    return response == f'{question} {answer}'\n")
    check = load_verifier(spec)
    assert check("How many? 5", ask("5")) is True
    assert check("5", ask("5")) is False
    assert load_verifier(spec.removesuffix(":check"))("How many? 5", ask("5")) is True


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def chekc(response, question, answer): ...", "has no function 'check'"),
        ("check = 5", "has no function 'check'"),
        ("def check(response): ...", "must take (response, question, answer)"),
        ("def check(:", "does not load: SyntaxError"),
        ("import nowhere_to_be", "does not load: ModuleNotFoundError: No module named 'nowhere_to_be' (my.py, line 1)"),
    ],
)
def test_broken_own_files_are_found_on_loading(body: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        load_verifier(own(tmp_path, body))


def test_a_missing_own_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no verifier file"):
        load_verifier(str(tmp_path / "none.py:check"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    return 1 / 0", "raised ZeroDivisionError: division by zero (my.py, line 2)"),
        ("    pass", "returned None: return True or False"),
        ("    return 0.5", "returned 0.5: return True or False"),
    ],
)
def test_own_mistakes_name_file_and_question(body: str, words: str, tmp_path: Path) -> None:
    spec = own(tmp_path, f"def check(response, question, answer):\n{body}\n")
    with pytest.raises(InputError) as caught:
        load_verifier(spec)("5", ask("5"))
    assert f"verifier {spec} on question q1 {words}" == str(caught.value)


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
