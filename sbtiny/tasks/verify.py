"""Verifiers: numeric, math, choice, exact, regex, auto, or a user's own file.

A verifier takes the text of a response and its Question and returns whether the answer is right. Model text is never
evaluated and cannot hang a verifier.
"""

import os
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.progress import print_line
from sbtiny.tasks.answers import boxed_answer, final_answer, last_line, marked_answer, stated_answer, unwrap_reference
from sbtiny.tasks.fields import suggestion
from sbtiny.tasks.latex import TEXT_INSIDE, Pair, math_process
from sbtiny.tasks.numbers import (
    EQUALS,
    LONE_NUMBER,
    MAX_NUMBER_CHARS,
    SENTENCE_CHANGES,
    lower_words,
    parse_number,
    same_number,
)
from sbtiny.tasks.sources import Question
from sbtiny.tasks.user_verifier import UserVerifier, VerifierTimeout, with_timeout

Verifier = Callable[[str, Question], bool]

MAX_MATH_CHARS = 1000  # longest answer that is parsed

LETTER_TEXT = r"[\s($*_`{\[]*+(?:\\(?:text|mathrm|mathbf|textbf)\s?\{)?[\s(*\[]*+(?:(?:the|option|choice|answer|letter)\s++)*+[(\[*]*+"
LONE_CHOICE = re.compile(rf"{LETTER_TEXT}([A-Za-z])[\s)\]*_`}}$.]*+", re.IGNORECASE)
CHOICE = re.compile(
    rf"{LETTER_TEXT}(?-i:([A-Z]))(?![\w'])(?P<close>[)\]*}}$`_]*+)(?:\s*+(?:$|[.,:;])|(?<=[)\]}}*])\s*+[^\s()+*/=^<>-]|(?P<word>\s++(?:[-–—]\s++)?\(?[A-Za-z]{{2,}}))",
    re.IGNORECASE,
)
LINE_CHOICE = re.compile(r"[*\s]*+([A-Z])[*]*+[.:][*]*+\s")
STATED_CHOICE = re.compile(
    r"(?i:\b(?:(?:choice|option|letter|answer)\s++(?:is|must\s++be|should\s++be|would\s++be)\b|(?:choice|option)\**+:|I\s++(?:choose|pick|select)\b))[\s:*]*+(?!not\b)(\S[^\n]*)"
)
CALLED_CORRECT = re.compile(r"(?<![\w'(*])[(*]*+([A-Z])[)*]*+\s++is\s++(?:the\s++)?(?:correct|right|best)\b")
BRACKETED_CHOICE = re.compile(r"(?<!not )(?<!not \()(?<!\w)([A-Z])\)")
SEVERAL = re.compile(r"[\s)\]*}$]*+(?:[,;/&]\s*+)?(?:[,;/&]|\\text\s?\{\s?(?:or|and)|(?:or|and)\b)[\s(*\[}]*+[A-Z](?![\w'])")
FORMULAS = re.compile(r"\$([^$]++)\$|\\\(((?:[^\\]|\\(?!\)))++)\\\)")


def numeric(response: str, question: Question) -> bool:
    """Compare the final answer with the reference exactly. Raises InputError when the reference is no number."""
    reference = unwrap_reference(question.answer)
    if parse_number(reference) is None:
        raise bad_reference(question, "number", "auto or math")
    number = find_number(response)
    return number is not None and same_number(reference, number) is True


def find_number(response: str) -> str | None:
    """Return the final answer where it is a number. A box must be one; a sentence may compute or contain it."""
    answer = final_answer(response)
    if not answer or parse_number(answer) is not None:
        return answer
    if len(answer) > MAX_NUMBER_CHARS:
        return None
    if boxed_answer(response):
        inside = stated_answer(TEXT_INSIDE.sub(r" \1 ", answer)) if "nswer" in answer else None
        return inside if inside and parse_number(inside) is not None else None
    if parse_number(worked_out := EQUALS.split(answer)[-1]) is not None:
        return worked_out
    changed = SENTENCE_CHANGES.intersection(lower_words(answer))
    numbers = [] if changed else LONE_NUMBER.findall(answer)
    return numbers[0] if len(numbers) == 1 else None


def choice(response: str, question: Question) -> bool:
    """Compare the letter: boxed, stated, alone on the last line, called correct, or the last one in brackets."""
    expected = LONE_CHOICE.fullmatch(unwrap_reference(question.answer))
    if not expected:
        raise bad_reference(question, "single letter", "auto or exact")
    return find_choice(response) == expected[1].upper()


def find_choice(response: str) -> str | None:
    """Find the chosen letter of a response. An article or a pronoun is no choice; two letters are none."""
    given, line = marked_answer(response), last_line(response)
    for text in (given, *STATED_CHOICE.findall(line)[-1:]):
        if text and (letter := chosen_letter(text)) is not None:
            return letter or None
    if given and boxed_answer(response):
        return None
    if lone := LONE_CHOICE.fullmatch(line) or LINE_CHOICE.match(line):
        return lone[1].upper()
    if called := CALLED_CORRECT.findall(line):
        return called[-1]
    *earlier, last = [None, None, *BRACKETED_CHOICE.finditer(response)]
    listed = earlier[-1] and SEVERAL.match(response, earlier[-1].end(1))
    return last[1] if last and not (listed and listed.end() >= last.end(1)) else None


def chosen_letter(text: str) -> str | None:
    """Read the letter that begins an answer: B, (B), `B because ...`. Empty for more than one letter."""
    if lone := LONE_CHOICE.fullmatch(text):
        return lone[1].upper()
    match = CHOICE.match(text)
    if not match:
        return None
    if SEVERAL.match(text, match.end(1)):
        return ""
    word = (match["word"] or "").strip()
    is_article = match[1] in "AI" and word and not match["close"] and word not in {"because", "since", "as"}
    return None if is_article else match[1].upper()


def exact(response: str, question: Question) -> bool:
    """Compare the marked answer or last line, and the whole text, with the reference, without case and white space."""
    candidates = (marked_answer(response) or last_line(response), response)
    return normalize_text(question.answer) in map(normalize_text, candidates)


def regex(response: str, question: Question) -> bool:
    """Match the reference, a regular expression, with the whole marked answer or the whole last line."""
    try:
        pattern = re.compile(question.pattern or question.answer)
    except re.error as error:
        raise bad_reference(question, f"regular expression ({error})", "exact") from error
    try:
        return with_timeout(pattern.fullmatch, marked_answer(response) or last_line(response)) is not None
    except VerifierTimeout as error:
        print_line(f"{question.location}: its regular expression {error}; counted as wrong")
        return False


def math(response: str, question: Question) -> bool:
    """Compare as text, as number, or by math-verify (extra `tasks`)."""
    if find_spec("math_verify") is None:
        raise InputError(f"{question.location}: math answers need math-verify: pip install 'sbtiny[tasks]'")
    if len(question.answer) > MAX_MATH_CHARS:
        raise bad_reference(question, f"answer of at most {MAX_MATH_CHARS} characters", "exact")
    return same_formula(response, question)


def same_formula(response: str, question: Question) -> bool:
    answer, reference = find_formula(response), unwrap_reference(question.answer)
    if not answer or max(len(answer), len(reference)) > MAX_MATH_CHARS:
        return False
    pair = Pair.of(reference, answer)
    verdict = pair.plain_verdict()
    return math_process(os.getpid()).same(question.location, pair.reference, pair.answer) if verdict is None else verdict


def find_formula(response: str) -> str | None:
    """Return the final answer, or the only formula of its sentence, or else the last line."""
    answer = marked_answer(response)
    if answer and not boxed_answer(response) and len(answer) <= MAX_MATH_CHARS:
        formulas = FORMULAS.findall(answer)
        changed = SENTENCE_CHANGES.intersection(lower_words(FORMULAS.sub(" ", answer)))
        return "".join(formulas[0]) if len(formulas) == 1 and not changed else answer
    return answer or final_answer(response) or last_line(response)


def auto(response: str, question: Question) -> bool:
    """Verify as numeric, choice or math, by the kind of reference. math-verify computes a formula that answers a number."""
    reference = unwrap_reference(question.answer)
    if parse_number(reference) is not None:
        number = find_number(response)
        if number is not None:
            return same_number(reference, number) is True
        return bool(marked_answer(response)) and find_spec("math_verify") is not None and same_formula(response, question)
    letter = LONE_CHOICE.fullmatch(reference)
    return choice(response, question) if letter and letter[1].isupper() else math(response, question)


def bad_reference(question: Question, wanted: str, better: str) -> InputError:
    return InputError(f"{question.location}: its answer {question.answer[:80]!r} is no {wanted}: use --verifier {better}")


def normalize_text(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


USER_VERIFIER = re.compile(r"(.+\.py)(?::(\w+))?")
BUILT_IN = {check.__name__: check for check in (auto, numeric, math, choice, exact, regex)}


def load_verifier(spec: str | None) -> Verifier:
    """Return a verifier by name, or the function `check(question, completion) -> bool | float` of a user's file: `my.py:check`.

    Raises InputError for an unknown name and for a file or function that is missing, broken or takes other parameters.
    """
    if spec is None or spec in BUILT_IN:
        return BUILT_IN[spec or "auto"]
    match = USER_VERIFIER.fullmatch(spec)
    if not match:
        near = suggestion(spec, BUILT_IN)
        raise InputError(f"unknown verifier {spec!r}{near}: choose from {', '.join(BUILT_IN)}, or give my.py:check")
    return UserVerifier(Path(expand_home(match[1])), match[2] or "check")


def user_file(spec: str) -> bytes:
    """Read the content of a user's verifier file, for comparing on resume; empty for a built-in verifier."""
    match = USER_VERIFIER.fullmatch(spec)
    return Path(expand_home(match[1])).read_bytes() if match else b""


def check_references(verify: Verifier, questions: Iterable[Question]) -> None:
    """Raise InputError with the row of the first reference that a built-in verifier cannot read."""
    if verify in BUILT_IN.values():
        for question in questions:
            verify("", question)  # reads the reference before the response
