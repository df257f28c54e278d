"""Whether two formulas are the same, told by math-verify in a process of its own that is killed when it takes too long."""

import json
import logging
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sbtiny.errors import Failed
from sbtiny.tasks.numbers import (
    EQUALS,
    TEXT,
    is_name_or_sum,
    joined_thousands,
    parse_number,
    same_number,
    unit_scale,
    without_layout,
)

MATH_SECONDS = 3.0  # for one symbolic comparison; most take hundredths
LONGEST_SUM = 200  # characters of arithmetic left standing that is worth working out
DIGITS = 3000  # to which a difference may have to be worked out
MATH_BYTES = 2 << 30  # address space of the comparing process


UNIT_BEHIND = re.compile(
    rf"\s?{TEXT}\{{([^{{}}]*+)\}}(?:\s?\^\s?\{{?[23]\}}?)?$|(?<=[0-9)}}])\s++([A-Za-z][A-Za-z /]*+)(?:\^\{{?[23]\}}?)?$"
)
DEGREES_BEHIND = re.compile(r"\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\(?:text)?degree|°)$")
TEXT_INSIDE = re.compile(rf"{TEXT}\{{([^{{}}]*+)\}}")
LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\s?\{[a-z]++\*?\}(?:\{[clr|]++\})?")
BASES = ["", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
BASE = re.compile(
    r"\(?([0-9A-Fa-f]++)\)?\s?_\s?\{?\s?(?:\\text(?:rm)?\s?\{)?\s?"
    r"([0-9]{1,3}|two|three|four|five|six|seven|eight|nine|ten)\s?\}*+"
)
ARGUMENTS = re.compile(r"(?<=[A-Za-z])\([^()]*+\)|(?<!\\)\{[^{}]*+\}")
SEVERAL_NUMBERS = re.compile(r"[,;]|(?<!\^)\b[0-9]++ [0-9]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
RELATION = re.compile(r"[<>≤≥≠]|\\(?:leq?|geq?|lt|gt|neq?|[pb]?mod)(?![A-Za-z])")
SYMBOLS = {"√": r"\sqrt", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "}
SYMBOLS |= {"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "≈": r"\approx "}
SYMBOLS |= {"θ": r"\theta ", "∅": r"\emptyset "}


@dataclass(frozen=True)
class Pair:
    """A reference and an answer as formulas without layout and units."""

    reference: str
    answer: str

    @classmethod
    def of(cls, reference: str, answer: str) -> "Pair":
        return cls(bare_formula(reference), bare_formula(answer))

    def plain_verdict(self) -> bool | None:
        """What reading the two tells; None where algebra must decide."""
        reference, answer = squeezed(self.reference), squeezed(self.answer)
        if reference == answer:
            return bool(answer)
        for verdict in (same_number(self.reference, self.answer), same_based_number(reference, answer)):
            if verdict is not None:
                return verdict
        if has_words(self.reference) or has_words(self.answer):
            return plain_words(self.reference) == plain_words(self.answer)
        if reference.lower() == answer.lower() and reference.isalpha():
            return len(reference) > 2 or reference.lower() == "no"  # AB is another segment than ab
        if reference.lower() == answer.lower() or (parse_number(self.reference) is not None and not self.may_be_number()):
            return False
        return None if self.names_fit() else False

    def may_be_number(self) -> bool:
        """An answer that is neither a list, nor an inequality, nor numbers side by side, nor longer than any sensible sum."""
        if len(self.answer) > LONGEST_SUM:
            return False
        outside, before = TEXT_INSIDE.sub(r" \1 ", self.answer), ""
        while outside != before:
            before, outside = outside, ARGUMENTS.sub("", outside)
        return not SEVERAL_NUMBERS.search(outside) and not RELATION.search(self.answer)

    def names_fit(self) -> bool:
        """An equation answers what is none only where its left side is a name or plain arithmetic."""
        if EQUALS.search(self.reference) or re.search("[,;]|text", self.answer):
            return True
        *left, _ = EQUALS.split(self.answer)
        values = [value for side in left if (value := parse_number(side)) is not None]
        return all(map(is_name_or_sum, left)) and all(value == parse_number(self.reference) for value in values)


def bare_formula(text: str) -> str:
    for sign, command in SYMBOLS.items() if not text.isascii() else ():
        text = text.replace(sign, command)
    text = joined_thousands(without_layout(text)).rstrip(" .,;:")
    text = re.sub(r"\\varnothing(?![A-Za-z])|^\\\{\s?\\\}$", r"\\emptyset", text)
    text = re.sub(r"\\sqrt\s?([0-9]{2,})", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\\)\bsqrt\s?\(([^()]*+)\)", r"\\sqrt{\1}", re.sub(r"\*\*\s?(-?[0-9]++)", r"^{\1}", text))
    behind = UNIT_BEHIND.search(text)
    if behind and behind.start() and unit_scale(" " + (behind[1] or behind[2] or "").strip()) == 1:
        text = text[: behind.start()]
    return DEGREES_BEHIND.sub("", text.rstrip())


def squeezed(latex: str) -> str:
    """A formula without spaces, except between digits, where they part numbers."""
    latex = re.sub(r"(?<=\\)[dtc](?=frac)", "", latex)
    return re.sub(r"(?<![0-9])\s++|\s++(?![0-9])", "", latex)


def has_words(text: str) -> bool:
    text = ENVIRONMENT.sub(" ", text)
    inside = (word for part in TEXT_INSIDE.findall(text) for word in re.findall("[A-Za-z]{2,}", part))
    return any(word not in ("and", "or") for word in inside) or bool(LONG_WORD.search(TEXT_INSIDE.sub(" ", text)))


def plain_words(text: str) -> str:
    return " ".join(re.sub(r"[{}$\"'’.!]", " ", TEXT_INSIDE.sub(r" \1 ", text)).split()).casefold()


def same_based_number(reference: str, answer: str) -> bool | None:
    """Whether two numbers written in a base are the same: of another base is wrong, for the base was asked for."""
    expected, found = BASE.fullmatch(reference), BASE.fullmatch(answer)
    if not expected and not found:
        return None
    if expected and found:
        return digits_and_base(expected) == digits_and_base(found)
    if expected:
        return expected[1].upper() == answer.strip("()").upper()
    digits, base = digits_and_base(found)
    return base == 10 and same_number(reference, digits) is True


def digits_and_base(match: re.Match[str]) -> tuple[str, int]:
    return match[1].upper().lstrip("0"), BASES.index(match[2]) if match[2] in BASES else int(match[2])


class MathProcess:
    """math-verify in a process of its own, killed when one comparison takes too long.

    math-verify's own limit is an alarm: it works in the main thread alone, and a huge number may fill the memory first.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def same(self, name: str, reference: str, answer: str) -> bool:
        with self.lock:
            process = self.process or self.start()
            reply = self.ask(process, json.dumps([reference, answer]), MATH_SECONDS)
        if reply not in ("true", "false"):
            why = f"comparing {reply or f'took over {MATH_SECONDS:.0f} s or too much memory'}: counted as wrong"
            logging.getLogger(__name__).warning("%s: %s", name, why)
        return reply == "true"

    def start(self) -> subprocess.Popen[str]:
        code = "from sbtiny.tasks.latex import compare_math; compare_math()"
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
    for line in sys.stdin:
        alarm(round(MATH_SECONDS) + 2)
        pair = json.loads(line)
        try:
            verdict = json.dumps(compare_pair(*pair)) if pair else "ready"
        except Exception as error:  # sympy raises anything, and a dead process would read as one that took too long
            verdict = f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:200]
        alarm(0)
        print(verdict, file=reply, flush=True)


def compare_pair(reference: str, answer: str) -> bool:
    """math-verify's verdict, but no units dropped by it and nothing held equal that differs in value."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = LatexExtractionConfig()  # the plain-text extractor hands text to sympy's parse_expr, which evaluates it
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False, boxed="none"))
    gold, found = (parse(f"${text}$", [latex], parsing_timeout=None) for text in (reference, answer))
    gold, found = ([region(one, text) for one in parsed] for parsed, text in ((gold, reference), (found, answer)))
    same = verify(gold, found, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same) and not (gold and found and differ(gold[0], found[0]))


def region(formula: Any, text: str) -> Any:
    """The numbers that inequalities in one unknown, with `or` or `and` between, allow; any other formula as it is."""
    from sympy import Eq, FiniteSet, Intersection, Union
    from sympy.core.relational import Relational

    if not isinstance(formula, FiniteSet) or not all(isinstance(one, Relational) for one in formula):
        return formula
    if len(formula.free_symbols) != 1 or any(isinstance(one, Eq) for one in formula):
        return formula
    join = Union if re.search(r"(?<![A-Za-z])or(?![A-Za-z])", text) else Intersection
    return join(*(one.as_set() for one in formula))


def differ(gold: Any, found: Any) -> bool:
    """Whether two formulas have other values: math-verify rounds, by which all that is tiny is the same."""
    from sympy import Eq, Expr, FiniteSet, Interval, MatrixBase, Tuple

    if isinstance(gold, Eq) and isinstance(found, Eq) and gold.lhs != found.lhs:
        return False  # the same line may be written in many ways
    gold, found = (formula.rhs if isinstance(formula, Eq) else formula for formula in (gold, found))
    if isinstance(gold, FiniteSet) and isinstance(found, FiniteSet):
        return any(all(differ(one, other) for other in found) for one in gold)
    if isinstance(gold, Interval) is not isinstance(found, Interval):
        return isinstance(gold, (FiniteSet, Tuple)) or isinstance(found, (FiniteSet, Tuple))  # (1,2) is no list of 1 and 2
    if isinstance(gold, Interval):
        gold, found = Tuple(gold.start, gold.end), Tuple(found.start, found.end)
    if isinstance(gold, (Tuple, MatrixBase)) and isinstance(found, (Tuple, MatrixBase)):
        return any(differ(one, other) for one, other in zip(gold, found, strict=True))
    return isinstance(gold, Expr) and isinstance(found, Expr) and differ_in_value(gold, found)


def differ_in_value(gold: Any, found: Any) -> bool:
    """Compares at one point: rationals exactly, decimals to six digits, the rest to as many digits as it takes."""
    from sympy import Float, Rational

    floats = gold.atoms(Float) | found.atoms(Float)
    exact = {value: Rational(str(value)) for value in floats}
    symbols = sorted(gold.free_symbols | found.free_symbols, key=str)
    point = {symbol: Rational(17 + 6 * place, 13) for place, symbol in enumerate(symbols)}
    gold, found = (formula.xreplace(exact).subs(point).doit() for formula in (gold, found))
    if gold.is_Rational and found.is_Rational:
        return bool(gold != found)
    difference = (gold - found).evalf(15, maxn=DIGITS)
    if floats:
        return bool(abs(difference) > 1e-6 * abs(gold.evalf(15)))
    return any(part.is_Float and part._prec > 1 and part != 0 for part in difference.as_real_imag())
