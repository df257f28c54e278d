"""How an answer is checked: numeric, math, choice, exact, regex, or a user's own file.

A verifier takes the text of a response and its Question and says whether the answer is right. Model text is never
evaluated and cannot hang a verifier: searches are linear in the text, numbers are exact fractions of bounded size, and
symbolic comparison runs in a process of its own that is killed when it takes too long.
"""

import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from sbtiny.errors import Failed, InputError
from sbtiny.tasks.sources import Question

Verifier = Callable[[str, Question], bool]

LONGEST_NUMBER = 300  # characters; Python refuses integers above 4300 digits
LARGEST_EXPONENT = 400  # 1e999999999 would fill the memory
LONGEST_MATH = 1000  # characters of an answer that is worth parsing
MATH_SECONDS = 3.0  # for one symbolic comparison; most take hundredths
MATH_BYTES = 2 << 30  # address space of the comparing process

# Possessive quantifiers (*+, ++) keep searches linear. Digits are ASCII: \d and int() take other scripts too.
BRACES = re.compile(r"\\{1,2}(boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+(\S[^\n]*)")
STATED = re.compile(
    r"\banswer(?:\s++is\b|\s*+\**+\s*+[:=])[\s:*]*+(?!(?:not|correct|incorrect|right|wrong|indeed)\b)(\S[^\n]*)", re.I
)
SENTENCE_END = re.compile(r"\.(?=\s|$)|<[|/]")  # a special token or a closing tag ends it too
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)"
DIGITS = rf"(?:{WHOLE}(?:\.[0-9]++)?|\.[0-9]++)"
POWER = r"(?:[eE]([+-]?[0-9]++)|\s?(?:\\times|\\cdot|×|\*)\s?10\s?(?:\^|\*\*)\s?\{?\s?([+-]?[0-9]++)\s?\}?)"
NUMBER = re.compile(rf"([+-]?)\s?(?:([0-9]{{1,9}})\s)?(-?{DIGITS})(?:\s?/\s?(-?{DIGITS}))?{POWER}?")
PLAIN_NUMBER = rf"\$?{DIGITS}(?:/{DIGITS})?(?:[eE][+-]?[0-9]++)?"
LAST_NUMBER = re.compile(rf"(?:(?<![\w)}}.\\-])-)?(?:\\[dt]?frac\{{{DIGITS}\}}\{{{DIGITS}\}}|{PLAIN_NUMBER})")
LONE_NUMBER = re.compile(rf"(?<![\w\\^.])-?{PLAIN_NUMBER}(?![\w^]|\s?[\\_])")
SHORT_UNIT = r"(?:[ckm]m|[km]g|m[lL]|ft|in|lbs?|hrs?|mins?|mph|[ap]m|[KMGT]B|st|nd|rd|th)\b"  # 5cm; 5xy is no unit
UNITS = re.compile(
    rf"(?:\s?%|{SHORT_UNIT}|[A-Za-z]{{4,}}|[\s(-]++[A-Za-z]{{2,}}|\s[mgshlL]\b)"
    r"(?:[\s/·.'()-]++[A-Za-z]++|\s?\^\s?\{?[23]\}?|[²³])*+[\s.,;)]*+"
)
NOT_UNITS = {"or", "and", "to", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "times", "plus", "minus"}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
LEFT_SIDE = re.compile(r"[^0-9+*/^<>,;-]*+|[^A-Za-z]*+")  # a name or plain arithmetic, not an equation in x
REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        ("[−﹣－]", "-"),
        (r"\\[!,]\s*+", ""),
        (r"\{,\}", ","),
        (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s?\{([^{}]*+)\}", r" \1 "),
        (r"\\[dtc]?frac\s?\{([^{}]*+)\}\s?\{([^{}]*+)\}", r" \1/\2"),
        (r"\\[dtc]?frac\s?(?:\{([0-9]++)\}|([0-9]))\s?(?:\{([0-9]++)\}|([0-9]))", r" \1\2/\3\4"),
        (r"\\%", "%"),
        (r"\^\s?\{?\s?(?:\\circ|st|nd|rd|th)\b\s?\}?|°", " "),
        (r"(?<![\w)*])\*++|\*++(?![\w(])", " "),  # Markdown, not 2**10
        (r"\\left\b|\\right\b|\\[()\[\] ;:]|\\?[$€£¥₹]|~", " "),
        (r"\s++", " "),
    )
)
LETTER_TEXT = r"(?:\\(?:text|mathrm|textbf|mathbf)\s?\{)?\s*+"
CHOICE = re.compile(rf"[\s($*{{]*+{LETTER_TEXT}[(*]*+([A-E])(?![\w'])")
LONE_CHOICE = re.compile(rf"{LETTER_TEXT}\(?([A-Ea-e])\)?\s*+\}}?\.?")
BRACKETED_CHOICE = re.compile(r"(?<!\w)([A-E])\)")


def final_answer(text: str) -> str | None:
    r"""The last `\boxed{x}`, else the last `#### x`, else the last `answer is x` or `answer: x`, else the last number.

    Braces are balanced; an empty or unclosed box does not count. None where there is nothing of the kind.
    """
    found = given_answer(text)
    if found is None:
        for number in LAST_NUMBER.finditer(text.replace("−", "-")):
            found = number[0]
    return found


def given_answer(text: str) -> str | None:
    """The answer that a text gives expressly: boxed, after ####, or after `answer is`; None where it gives none."""
    return boxed_answer(text) or hashed_answer(text) or stated_answer(text)


def boxed_answer(text: str) -> str | None:
    """Inside the box that opens last; of nested boxes the inner one."""
    opened: list[int] = []
    latest, found = 0, None
    for token in BRACES.finditer(text):
        if token[0] == "{" or token[1]:
            opened.append(token.end() if token[1] else 0)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > latest and (inside := text[start : token.start()].strip()):
                latest, found = start, inside
    return found


def hashed_answer(text: str) -> str | None:
    """After the last #### that is no Markdown heading: a heading is no number and has text below it."""
    found, end = None, len(text.rstrip())
    for line in HASHES.finditer(text):
        content = SENTENCE_END.split(line[1])[0].strip()
        if content and (line.end() >= end or parse_number(content) is not None):
            found = content
    return found


def stated_answer(text: str) -> str | None:
    found = None
    for line in STATED.finditer(text):
        found = SENTENCE_END.split(line[1])[0].strip(" *") or found
    return found


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, or None.

    Takes signs, 1,234, decimals, 3/4, \frac, mixed numbers, 1.5e3, 1.5 \times 10^3, currency, a name with `=` in front,
    and units behind, which are dropped: 50% is 50. Words such as million multiply. Exponents beyond 400 are refused.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    *left, number = EQUALS.split(text)
    match = NUMBER.match(number := number.strip())
    if not match or not all(LEFT_SIDE.fullmatch(re.sub(r"\\[A-Za-z]++", "", part)) for part in left):
        return None
    scale = unit_scale(number[match.end() :])
    return fraction(match, scale) if scale else None


def unit_scale(rest: str) -> int | None:
    """What the text behind a number multiplies it by: 1 for nothing or a unit; None when it is more than a unit."""
    words = re.findall("[a-z]+", rest.lower())
    if NOT_UNITS.intersection(words) or (rest.strip(" .,;)") and not UNITS.fullmatch(rest)):
        return None
    return SCALES.get(words[0], 1) if words else 1


def fraction(match: re.Match[str], scale: int) -> Fraction | None:
    sign, whole, over, under, *exponents = match.groups()
    exponent = int(exponents[0] or exponents[1] or 0)
    if abs(exponent) > LARGEST_EXPONENT or (whole and not under) or ((whole or sign) and over.startswith("-")):
        return None
    value, divisor = (Fraction((part or "1").replace(",", "")) for part in (over, under))
    if not divisor:
        return None
    value = (int(whole or 0) + value / divisor) * scale * Fraction(10) ** exponent
    return -value if sign == "-" else value


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
    return pattern.fullmatch(given_answer(response) or last_line(response)) is not None


def math(response: str, question: Question) -> bool:
    """The same text, the same number, or the same by math-verify, which is in the extra `tasks`."""
    if find_spec("math_verify") is None:
        raise InputError(f"question {question.id}: math answers need math-verify: pip install 'sbtiny[tasks]'")
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
    return InputError(f"question {question.id}: its answer {question.answer!r} is no {wanted}: use --verifier {better}")


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()


def plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def squeezed(latex: str) -> str:
    """LaTeX without what never changes its meaning: spaces, the size of brackets and fractions, a final full stop."""
    return re.sub(r"\s|\\left\b|\\right\b|\\[!,;: ]|\$|(?<=\\)[dt](?=frac)|\.$", "", latex)


class MathProcess:
    """math-verify in a process of its own, killed when one comparison takes too long.

    math-verify's own limit is an alarm: it works in the main thread alone, and a huge number may fill the memory first.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def same(self, question: Question, answer: str) -> bool:
        with self.lock:
            process = self.process or self.start()
            reply = self.ask(process, json.dumps([question.answer, answer]), MATH_SECONDS)
        if not reply:
            why = f"comparing took over {MATH_SECONDS:.0f} s or too much memory: counted as wrong"
            logging.getLogger(__name__).warning("question %s: %s", question.id, why)
        return reply == "true"

    def start(self) -> subprocess.Popen[str]:
        code = "from sbtiny.tasks.verify import compare_math; compare_math()"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent
        )
        if self.ask(self.process, "[]", seconds=60.0) != "ready":
            raise Failed(f"math-verify does not start: run {sys.executable} -c 'import math_verify' to see why")
        return self.process

    def ask(self, process: subprocess.Popen[str], line: str, seconds: float) -> str:
        """One line of reply, or nothing when the process died or had to be killed."""
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        reply = ""
        try:
            with suppress(BrokenPipeError):
                print(line, file=process.stdin, flush=True)
                reply = process.stdout.readline().strip()
        finally:
            timer.cancel()
            if not reply:  # also after Ctrl-C: a late reply must not answer the next question
                process.kill()
                process.communicate()
                self.process = None
        return reply


@cache
def math_process(pid: int) -> MathProcess:
    """The comparing process of process `pid`: a forked child must not talk through its parent's pipes."""
    return MathProcess()


def compare_math() -> None:
    """The work of that process: pairs of reference and answer on stdin, `true` or `false` on stdout."""
    reply, sys.stdout = sys.stdout, sys.stderr  # libraries print
    logging.disable()
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, MATH_BYTES))
    alarm = getattr(signal, "alarm", lambda seconds: None)  # its default is to end the process: for one left an orphan
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]  # the plain-text extractor hands text to sympy's parse_expr, which evaluates it
    for line in sys.stdin:
        alarm(round(MATH_SECONDS) + 2)
        verdict = "ready"
        if pair := json.loads(line):
            gold, found = (parse(f"${text}$", latex, parsing_timeout=None) for text in pair)
            verdict = json.dumps(verify(gold, found, timeout_seconds=None))
        alarm(0)
        print(verdict, file=reply, flush=True)


BUILT_IN = {check.__name__: check for check in (auto, numeric, math, choice, exact, regex)}


def load_verifier(spec: str | None) -> Verifier:
    """A verifier by name, or the function `check(response, question, answer) -> bool` of a user's file: `my.py:check`.

    Raises InputError for an unknown name and for a file or function that is missing, broken or takes other parameters.
    """
    if spec is None or spec in BUILT_IN:
        return BUILT_IN[spec or "auto"]
    match = re.fullmatch(r"(.+\.py)(?::(\w+))?", spec)
    if not match:
        near = get_close_matches(spec, BUILT_IN, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown verifier {spec!r}{hint}: choose from {', '.join(BUILT_IN)}, or give my.py:check")
    return own_verifier(Path(match[1]).expanduser(), match[2] or "check")


def own_verifier(path: Path, function: str) -> Verifier:
    """The user's function as a verifier; what goes wrong inside is an InputError with file, question and reason."""
    check = own_function(path, function)

    def verifier(response: str, question: Question) -> bool:
        where = f"verifier {path}:{function} on question {question.id}"
        try:
            verdict = check(response, question.question, question.answer)
        except Exception as error:  # the user's code may raise anything: said again with the place, never swallowed
            raise InputError(f"{where} raised {told(error, path)}") from error
        if type(verdict).__name__ not in ("bool", "bool_"):  # bool_ is numpy's
            raise InputError(f"{where} returned {verdict!r}: return True or False")
        return bool(verdict)

    return verifier


def own_function(path: Path, function: str) -> Callable[[str, str, str], bool]:
    if not path.is_file():
        raise InputError(f"no verifier file {path}: give it as my.py:check")
    check = getattr(own_module(path), function, None)
    if not callable(check):
        raise InputError(f"{path} has no function {function!r}: define {function}(response, question, answer) -> bool")
    try:
        inspect.signature(check).bind("response", "question", "answer")
    except TypeError as error:
        raise InputError(f"{path}:{function} must take (response, question, answer): {error}") from error
    return check


def own_module(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"sbtiny_verifier_{path.stem}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # loading runs the user's code
        raise InputError(f"verifier file {path} does not load: {told(error, path)}") from error
    return module


def told(error: Exception, path: Path) -> str:
    """An exception in one line: kind, message, and the line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place
