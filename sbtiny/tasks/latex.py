"""Decide whether two formulas are equal, with math-verify in a process of its own that is killed when it takes too long."""

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
    compile_rules,
    is_name_or_sum,
    joined_thousands,
    parse_number,
    rewrite,
    same_number,
    unit_scale,
    without_layout,
)

MATH_SECONDS = 3.0  # for one symbolic comparison; most take hundredths
LONGEST_SUM = 200  # characters; longer arithmetic is not worked out
DIGITS = 3000  # most digits of a difference
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
SYMBOLS = {"√": r"\sqrt", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "θ": r"\theta "}
SYMBOLS |= {"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "≈": r"\approx ", "∅": r"\emptyset "}
SYMBOLS = str.maketrans(SYMBOLS)
FORMULA = compile_rules(
    (r"\\varnothing(?![A-Za-z])|^\\\{\s?\\\}$", r"\\emptyset"),
    (r"\\sqrt\s?([0-9]{2,})", r"\\sqrt{\1}"),
    (r"\*\*\s?(-?[0-9]++)", r"^{\1}"),
    (r"(?<!\\)\bsqrt\s?\(([^()]*+)\)", r"\\sqrt{\1}"),
)


@dataclass(frozen=True)
class Pair:
    """A reference and an answer as formulas without layout and units."""

    reference: str
    answer: str

    @classmethod
    def of(cls, reference: str, answer: str) -> "Pair":
        return cls(bare_formula(reference), bare_formula(answer))

    def plain_verdict(self) -> bool | None:
        """Compare the two as text and numbers. None where algebra must decide."""
        reference, answer = squeezed(self.reference), squeezed(self.answer)
        if reference == answer:
            return bool(answer)
        for verdict in (same_number(self.reference, self.answer), same_based_number(reference, answer)):
            if verdict is not None:
                return verdict
        if has_words(self.reference) or has_words(self.answer):
            return plain_words(self.reference) == plain_words(self.answer)
        if reference.lower() == answer.lower() and reference.isalpha():
            return len(reference) > 2 or reference.lower() == "no"  # AB and ab are different segments
        if reference.lower() == answer.lower() or (parse_number(self.reference) is not None and not self.may_be_number()):
            return False
        return None if self.names_fit() else False

    def may_be_number(self) -> bool:
        """Whether the answer is no list, no inequality, no row of numbers, and not longer than LONGEST_SUM."""
        if len(self.answer) > LONGEST_SUM:
            return False
        outside, before = TEXT_INSIDE.sub(r" \1 ", self.answer), ""
        while outside != before:
            before, outside = outside, ARGUMENTS.sub("", outside)
        return not SEVERAL_NUMBERS.search(outside) and not RELATION.search(self.answer)

    def names_fit(self) -> bool:
        """Whether an equation may answer a reference without one: its left side must be a name or plain arithmetic."""
        if EQUALS.search(self.reference) or re.search("[,;]|text", self.answer):
            return True
        *left, _ = EQUALS.split(self.answer)
        values = [value for side in left if (value := parse_number(side)) is not None]
        return all(map(is_name_or_sum, left)) and all(value == parse_number(self.reference) for value in values)


def bare_formula(text: str) -> str:
    text = rewrite(joined_thousands(without_layout(text.translate(SYMBOLS))).rstrip(" .,;:"), FORMULA)
    unit = UNIT_BEHIND.search(text)
    if unit and unit.start() and unit_scale(" " + (unit[1] or unit[2] or "").strip()) == 1:
        text = text[: unit.start()]
    return DEGREES_BEHIND.sub("", text.rstrip())


def squeezed(latex: str) -> str:
    """Remove the spaces of a formula, except between digits, where they separate numbers."""
    latex = re.sub(r"(?<=\\)[dtc](?=frac)", "", latex)
    return re.sub(r"(?<![0-9])\s++|\s++(?![0-9])", "", latex)


def has_words(text: str) -> bool:
    text = ENVIRONMENT.sub(" ", text)
    inside = (word for part in TEXT_INSIDE.findall(text) for word in re.findall("[A-Za-z]{2,}", part))
    return any(word not in ("and", "or") for word in inside) or bool(LONG_WORD.search(TEXT_INSIDE.sub(" ", text)))


def plain_words(text: str) -> str:
    return " ".join(re.sub(r"[{}$\"'’.!]", " ", TEXT_INSIDE.sub(r" \1 ", text)).split()).casefold()


def same_based_number(reference: str, answer: str) -> bool | None:
    """Whether two numbers with a base are equal in digits and base. None where neither has a base."""
    expected, given = BASE.fullmatch(reference), BASE.fullmatch(answer)
    if not expected and not given:
        return None
    if expected and given:
        return digits_and_base(expected) == digits_and_base(given)
    if expected:
        return expected[1].upper() == answer.strip("()").upper()
    digits, base = digits_and_base(given)
    return base == 10 and same_number(reference, digits) is True


def digits_and_base(match: re.Match[str]) -> tuple[str, int]:
    return match[1].upper().lstrip("0"), BASES.index(match[2]) if match[2] in BASES else int(match[2])


class MathProcess:
    """math-verify in a process of its own, killed when one comparison takes too long.

    math-verify limits itself by an alarm, which works only in the main thread and not against full memory.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def same(self, name: str, reference: str, answer: str) -> bool:
        with self.lock:
            process = self.process or self.start()
            reply = self.ask(process, json.dumps([reference, answer]), MATH_SECONDS)
        if reply not in ("true", "false"):
            failure = f"comparing {reply or f'took over {MATH_SECONDS:.0f} s or too much memory'}: counted as wrong"
            logging.getLogger(__name__).warning("%s: %s", name, failure)
        return reply == "true"

    def start(self) -> subprocess.Popen[str]:
        code = "from sbtiny.tasks.latex import run_math_worker; run_math_worker()"
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
        """Send a line and read one line of reply; empty when the process died or was killed."""
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        reply = ""
        try:
            with suppress(BrokenPipeError):
                print(line, file=process.stdin, flush=True)
                reply = process.stdout.readline().strip()
        finally:
            timer.cancel()
            if not reply:  # also after Ctrl-C, or a late reply would answer the next question
                process.kill()
                process.communicate()
                self.process = None
        return reply


@cache
def math_process(pid: int) -> MathProcess:
    """Return the comparing process of process `pid`. A forked child gets its own, as it must not use its parent's pipes."""
    return MathProcess()


def run_math_worker() -> None:
    """Run the comparing process: read pairs of reference and answer from stdin, write `true` or `false` to stdout."""
    reply, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout
    logging.disable()
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, MATH_BYTES))
    alarm = getattr(signal, "alarm", lambda seconds: None)  # SIGALRM ends a process whose parent is gone
    for line in sys.stdin:
        alarm(round(MATH_SECONDS) + 2)
        pair = json.loads(line)
        try:
            verdict = json.dumps(compare_pair(*pair)) if pair else "ready"
        except Exception as error:  # sympy raises anything, and a dead process would be reported as too slow
            verdict = f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:200]
        alarm(0)
        print(verdict, file=reply, flush=True)


def compare_pair(reference: str, answer: str) -> bool:
    """Compare with math-verify, without its dropping of units; formulas of different value are never equal."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = LatexExtractionConfig()  # the plain-text extractor hands text to sympy's parse_expr, which evaluates it
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False, boxed="none"))
    gold, given = (parse(f"${text}$", [latex], parsing_timeout=None) for text in (reference, answer))
    gold, given = ([solution_set(one, text) for one in parsed] for parsed, text in ((gold, reference), (given, answer)))
    same = verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same) and not (gold and given and differ(gold[0], given[0]))


def solution_set(formula: Any, text: str) -> Any:
    """Convert inequalities in one unknown, joined by `or` or `and`, to the set they allow. Return any other formula as it is."""
    from sympy import Eq, FiniteSet, Intersection, Union
    from sympy.core.relational import Relational

    if not isinstance(formula, FiniteSet) or not all(isinstance(one, Relational) for one in formula):
        return formula
    if len(formula.free_symbols) != 1 or any(isinstance(one, Eq) for one in formula):
        return formula
    join = Union if re.search(r"(?<![A-Za-z])or(?![A-Za-z])", text) else Intersection
    return join(*(one.as_set() for one in formula))


def differ(gold: Any, given: Any) -> bool:
    """Whether two formulas differ in value. math-verify alone rounds, so that all tiny values are equal."""
    from sympy import Eq, Expr, FiniteSet, Interval, MatrixBase, Tuple

    if isinstance(gold, Eq) and isinstance(given, Eq) and gold.lhs != given.lhs:
        return False  # the same line may be written in many ways
    gold, given = (formula.rhs if isinstance(formula, Eq) else formula for formula in (gold, given))
    if isinstance(gold, FiniteSet) and isinstance(given, FiniteSet):
        return any(all(differ(one, other) for other in given) for one in gold)
    if isinstance(gold, Interval) is not isinstance(given, Interval):
        return isinstance(gold, (FiniteSet, Tuple)) or isinstance(given, (FiniteSet, Tuple))  # (1,2) is no list of 1 and 2
    if isinstance(gold, Interval):
        gold, given = Tuple(gold.start, gold.end), Tuple(given.start, given.end)
    if isinstance(gold, (Tuple, MatrixBase)) and isinstance(given, (Tuple, MatrixBase)):
        return any(differ(one, other) for one, other in zip(gold, given, strict=True))
    return isinstance(gold, Expr) and isinstance(given, Expr) and differ_in_value(gold, given)


def differ_in_value(gold: Any, given: Any) -> bool:
    """Whether two formulas differ at one point: rationals exactly, decimals to six digits, others to up to DIGITS digits."""
    from sympy import Float, Rational

    floats = gold.atoms(Float) | given.atoms(Float)
    exact = {value: Rational(str(value)) for value in floats}
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    point = {symbol: Rational(17 + 6 * place, 13) for place, symbol in enumerate(symbols)}
    gold, given = (formula.xreplace(exact).subs(point).doit() for formula in (gold, given))
    if gold.is_Rational and given.is_Rational:
        return bool(gold != given)
    difference = (gold - given).evalf(15, maxn=DIGITS)
    if floats:
        return bool(abs(difference) > 1e-6 * abs(gold.evalf(15)))
    return any(part.is_Float and part._prec > 1 and part != 0 for part in difference.as_real_imag())
