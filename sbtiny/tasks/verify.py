"""How an answer is checked: numeric, math, choice, exact, regex, or a user's own file.

A verifier takes the text of a response and its Question and says whether the answer is right. Model text is never
evaluated and cannot hang a verifier.
"""

import os
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.algebra import math_process, squeezed
from sbtiny.tasks.answers import boxed_answer, final_answer, given_answer, last_line
from sbtiny.tasks.limit import TooLong, limited
from sbtiny.tasks.numbers import EQUALS, LONE_NUMBER, LONGEST_NUMBER, parse_number
from sbtiny.tasks.own import OwnVerifier
from sbtiny.tasks.sources import Question

Verifier = Callable[[str, Question], bool]

LONGEST_MATH = 1000  # characters of an answer that is worth parsing

LETTER_TEXT = r"(?:\\(?:text|mathrm|textbf|mathbf)\s?\{)?\s*+"
CHOICE = re.compile(rf"[\s($*{{]*+{LETTER_TEXT}[(*]*+([A-E])(?![\w'])")
LONE_CHOICE = re.compile(rf"{LETTER_TEXT}\(?([A-Ea-e])\)?\s*+\}}?\.?")
BRACKETED_CHOICE = re.compile(r"(?<!\w)([A-E])\)")


def numeric(response: str, question: Question) -> bool:
    """Exact comparison of the final answer with the reference. Raises InputError when the reference is no number."""
    expected = parse_number(question.answer)
    if expected is None:
        raise bad_reference(question, "number", "auto or math")
    return expected == found_number(response)


def found_number(response: str) -> Fraction | None:
    """The final answer as a number. A box must be one; a sentence may work it out or hold it among words."""
    answer = final_answer(response)
    value = parse_number(answer) if answer else None
    if value is None and answer and len(answer) <= LONGEST_NUMBER and not boxed_answer(response):
        value = parse_number(EQUALS.split(answer)[-1])
        numbers = LONE_NUMBER.findall(answer)
        if value is None and len(numbers) == 1:
            value = parse_number(numbers[0])
    return value


def choice(response: str, question: Question) -> bool:
    """The letter A to E of a response: boxed, stated, alone on its last line, or the last one in brackets."""
    expected = LONE_CHOICE.fullmatch(question.answer.strip())
    if not expected:
        raise bad_reference(question, "letter A to E", "auto or exact")
    given = given_answer(response)
    found = LONE_CHOICE.fullmatch(given or last_line(response)) or (CHOICE.match(given) if given else None)
    letters = [found[1]] if found else BRACKETED_CHOICE.findall(response)
    return bool(letters) and letters[-1].upper() == expected[1].upper()


def exact(response: str, question: Question) -> bool:
    """The given answer, the last line or the whole text is the reference, case and white space aside."""
    candidates = (given_answer(response) or last_line(response), response)
    return plain(question.answer) in map(plain, candidates)


def regex(response: str, question: Question) -> bool:
    """The reference is a regular expression that must match the whole given answer, or the whole last line."""
    try:
        pattern = re.compile(question.answer)
    except re.error as error:
        raise bad_reference(question, f"regular expression ({error})", "exact") from error
    try:
        return limited(pattern.fullmatch, given_answer(response) or last_line(response)) is not None
    except TooLong as error:
        console.print(f"{question.named}: its regular expression {error}; counted as wrong", markup=False, highlight=False, soft_wrap=True)
        return False


def math(response: str, question: Question) -> bool:
    """The same text, the same number, or the same by math-verify, which is in the extra `tasks`."""
    if find_spec("math_verify") is None:
        raise InputError(f"{question.named}: math answers need math-verify: pip install 'sbtiny[tasks]'")
    if len(question.answer) > LONGEST_MATH:
        raise bad_reference(question, f"answer of at most {LONGEST_MATH} characters", "exact")
    answer = (final_answer(response) or "").strip(" $")
    if not answer or len(answer) > LONGEST_MATH:
        return False
    if squeezed(answer) == squeezed(question.answer):
        return True
    expected, value = parse_number(question.answer), parse_number(answer)
    if expected is not None and value is not None:
        return expected == value
    return math_process(os.getpid()).same(question, answer)


def auto(response: str, question: Question) -> bool:
    """numeric, choice or math, as the reference answer asks for."""
    if parse_number(question.answer) is not None:
        return numeric(response, question)
    letter = LONE_CHOICE.fullmatch(question.answer.strip())
    return choice(response, question) if letter and letter[1].isupper() else math(response, question)


def bad_reference(question: Question, wanted: str, better: str) -> InputError:
    return InputError(f"{question.named}: its answer {question.answer[:80]!r} is no {wanted}: use --verifier {better}")


def plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


OWN = re.compile(r"(.+\.py)(?::(\w+))?")
BUILT_IN = {check.__name__: check for check in (auto, numeric, math, choice, exact, regex)}


def load_verifier(spec: str | None) -> Verifier:
    """A verifier by name, or the function `check(question, completion) -> bool | float` of a user's file: `my.py:check`.

    Raises InputError for an unknown name and for a file or function that is missing, broken or takes other parameters.
    """
    if spec is None or spec in BUILT_IN:
        return BUILT_IN[spec or "auto"]
    match = OWN.fullmatch(spec)
    if not match:
        near = get_close_matches(spec, BUILT_IN, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown verifier {spec!r}{hint}: choose from {', '.join(BUILT_IN)}, or give my.py:check")
    return OwnVerifier(Path(match[1]).expanduser(), match[2] or "check")


def own_file(spec: str) -> bytes:
    """The content of a user's own verifier, for with another one it may decide otherwise; nothing for one that is built in."""
    match = OWN.fullmatch(spec)
    return Path(match[1]).expanduser().read_bytes() if match else b""


def check_references(verify: Verifier, questions: Iterable[Question]) -> None:
    """Raises InputError with the row of a reference that the verifier cannot read; what a user's own can read is not known."""
    if verify in BUILT_IN.values():
        for question in questions:
            verify("", question)  # reads the reference first
