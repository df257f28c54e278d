"""How an answer is checked: numeric, math, choice, exact, regex, or a user's own file.

A verifier takes the text of a response and its Question and says whether the answer is right. No verifier evaluates model text, and
none can be hung by it: numbers are exact fractions of bounded length, and symbolic comparison runs in a process that is killed when
it takes too long.
"""

import inspect
import json
import logging
import os
import re
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

from sbtiny.errors import Failed, InputError
from sbtiny.tasks.sources import Question

Verifier = Callable[[str, Question], bool]

LONGEST_NUMBER = 300  # characters; Python itself refuses integers above 4300 digits
LONGEST_MATH = 1000  # characters of an answer that is worth parsing
LARGEST_EXPONENT = 400  # 1e999999999 would fill the memory
MATH_SECONDS = 3.0  # for one symbolic comparison; a usual one takes hundredths
MATH_BYTES = 2 << 30  # address space of the comparing process

# --- The final answer in a text. Possessive quantifiers (*+, ++) keep every search linear in the text.
BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+(\S[^\n]*)")
STATED = re.compile(r"\banswer(?:\s++is\b|\s*+\**+\s*+[:=])[\s:*]*+(\S[^\n]*)", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?=\s|$)|<[|/]")  # also the start of a special token or a closing tag

# --- Numbers. ASCII digits only: int() would also read other scripts, and `\d` matches them.
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]*+)?|\.[0-9]++)"
POWER = r"(?:[eE](?P<exp>[+-]?[0-9]++)|\s?(?:\\times|\\cdot|×|\*)\s?10\s?(?:\^|\*\*)\s?\{?(?P<exp10>[+-]?[0-9]++)\}?)"
FRACTION = (
    rf"\\frac\s?(?:\{{\s?(?P<top>-?\s?{DIGITS})\s?\}}|(?P<top1>[0-9]))\s?(?:\{{\s?(?P<low>-?\s?{DIGITS})\s?\}}|(?P<low1>[0-9]))"
)
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?(?:(?P<whole>[0-9]{{1,9}})?\s?{FRACTION}"
    rf"|(?:(?P<mixed>[0-9]{{1,9}})\s)?(?P<over>{DIGITS})\s?/\s?(?P<under>{DIGITS})(?!\s?[A-Za-z])"
    rf"|(?P<plain>{DIGITS})(?:{POWER})?)"
)
LOOSE_NUMBER = re.compile(rf"(?<![\w)}}.^\\])-?\$?(?:\\[dt]?frac\{{-?{DIGITS}\}}\{{{DIGITS}\}}|{DIGITS}(?:/{DIGITS})?(?:[eE][+-]?[0-9]++)?)")
UNITS = re.compile(r"(?:[\s-]*(?:%|[A-Za-z]{2,})|\s[mgshlL]\b)(?:[\s/·.'-]++[A-Za-z]++|\s?\^\s?\{?[23]\}?|[²³])*+[\s.]*")
NOT_UNITS = {"or", "and", "to", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "times", "plus", "minus"}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"[−–﹣－]", "-"),
        (r"\\[!,]\s*+|\\left\b|\\right\b|\\[()\[\]]|[$€£¥₹*]", ""),
        (r"\{,\}", ","),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname)\s?\{([^{}]*+)\}", r" \1 "),
        (r"\\%", "%"),
        (r"\^\s?\{?\s?\\circ\s?\}?|°", ""),
        (r"\\[ ;:]|~|\s++", " "),
    )
)
LETTER = re.compile(r"(?:\\text|\\mathrm|\\textbf)?\s?\{?\s?\(?\s?([A-Ea-e])\s?[).:]?\s?\}?[.\s]*")


def final_answer(text: str) -> str | None:
    r"""The last `\boxed{...}`, else the last `#### x`, else the last `answer is x` or `answer: x`, else the last number.

    Braces are balanced, an empty or unclosed box does not count. None where there is nothing of the kind.
    """
    found = marked_answer(text) or stated_answer(text)
    if found is None and (numbers := LOOSE_NUMBER.findall(text.replace("−", "-"))):
        found = numbers[-1]
    return found


def marked_answer(text: str) -> str | None:
    """The answer that a text marks on purpose: boxed or after ####; None where nothing is marked."""
    opened: list[int] = []
    start_of_found, found = 0, None
    for token in BRACES.finditer(text):
        if token[0] == "{" or token[0].endswith("d{") or token[0].endswith("x{"):
            opened.append(token.end() if token[0] != "{" else 0)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > start_of_found and (inside := text[start : token.start()].strip()):
                start_of_found, found = start, inside
    return found
