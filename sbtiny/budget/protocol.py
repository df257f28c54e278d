"""The text format of a budget: `<budget>N</budget><solution>body</solution>` (SelfBudgeter, arXiv 2505.11274).

Only white space may stand before, between and after the tags and around N. N is written in the digits 0 to 9. Training,
evaluation and serving all read and write the tags here, so that they agree on the budget.

Reasoning parsers and "skip thinking" buttons understand the other format, `<budget>N</budget><think>thoughts</think>answer`. There N
counts thoughts and answer together. If it counted the thoughts alone, the model could cheat by thinking after `</think>`. The tag after
`</budget>` decides the format; in that format the tags of the other are ordinary words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Literal

from sbtiny.errors import InputError

BUDGET_OPEN = "<budget>"
BUDGET_CLOSE = "</budget>"
FormatName = Literal["solution", "think"]
MAX_BUDGET = 1_000_000
SCALE = re.compile(r"([0-9]{1,7}|[0-9]{0,7}\.[0-9]{1,9})([xs])")
BUDGET_FORMS = f"auto (the stated budget), a number of tokens from 1 to {MAX_BUDGET} such as 200, or a factor such as 0.5x"
SERVED_FORMS = f"{BUDGET_FORMS}, or seconds such as 30s, or what is promised at a chance such as 90%"


@dataclass(frozen=True, slots=True)
class Format:
    """The tags around the body. `answered`: the answer follows after the closing tag."""

    name: FormatName
    opening: str
    closing: str
    tag: re.Pattern[str]  # every tag of this format
    answered: bool
    wrap_up: str  # text put into an answer that is cut
    reserve: int  # tokens for the wrap-up and the final answer

    @property
    def shape(self) -> str:
        """A template of a completion, for messages."""
        return f"{BUDGET_OPEN}N{BUDGET_CLOSE}{self.opening}...{self.closing}{'answer' if self.answered else ''}"


SOLUTION = Format(
    "solution", "<solution>", "</solution>", re.compile("</?(?:budget|solution)>"), False, "\n\nTime is up. \\boxed{", reserve=64
)
THINK = Format("think", "<think>", "</think>", re.compile("</?(?:budget|think)>"), True, "\n\nTime is up.\n</think>\n\n", reserve=512)
FORMATS: dict[str, Format] = {f.name: f for f in (SOLUTION, THINK)}


class Outcome(StrEnum):
    """The first fault of a completion from the left, or OK. A stray tag is reported before stray text.

    | where           | fault               | meaning                                                              |
    |-----------------|---------------------|----------------------------------------------------------------------|
    | anywhere        | EMPTY               | nothing, or white space alone                                        |
    |                 | CUT                 | no fault so far, but it ends before `</solution>`, perhaps mid-tag   |
    | before N        | NO_BUDGET           | the first tag is not `<budget>`, or there is no tag                  |
    |                 | TEXT_OUTSIDE        | words before `<budget>`                                              |
    | N               | NESTED_TAG          | another tag before `</budget>`                                       |
    |                 | BUDGET_NOT_A_NUMBER | not digits: empty, words, a sign, a point, a comma                   |
    |                 | BUDGET_ZERO         | 0, with any number of zeros                                          |
    |                 | BUDGET_HUGE         | above MAX_BUDGET                                                     |
    | before the body | REPEATED_TAG        | a budget tag again                                                   |
    |                 | NO_SOLUTION         | `</solution>` that nothing opened, or words and no further tag       |
    |                 | TEXT_OUTSIDE        | words between `</budget>` and `<solution>`                           |
    | the body        | NESTED_TAG          | another tag before `</solution>`                                     |
    |                 | EMPTY_SOLUTION      | white space alone                                                    |
    | after the body  | REPEATED_TAG        | any tag again                                                        |
    |                 | TEXT_OUTSIDE        | words after `</solution>`                                            |
    | nowhere         | OK                  |                                                                      |

    CUT means that some continuation would make it OK: `<budget>0` is CUT (it may become 05), `<budget>0</budget>` is
    BUDGET_ZERO. With `<think>` the thoughts may be empty but the answer after them may not: a missing answer is CUT.
    """

    OK = auto()
    EMPTY = auto()
    CUT = auto()
    NO_BUDGET = auto()
    BUDGET_NOT_A_NUMBER = auto()
    BUDGET_ZERO = auto()
    BUDGET_HUGE = auto()
    REPEATED_TAG = auto()
    NESTED_TAG = auto()
    TEXT_OUTSIDE = auto()
    NO_SOLUTION = auto()
    EMPTY_SOLUTION = auto()


@dataclass(frozen=True, slots=True)
class Parsed:
    """The parts of a completion. Reading is lenient, so that a malformed completion can still be verified and shown.

    `budget` is set whenever the first two tags close around a legal number. `body` is the text from the first
    `<solution>` to the first `</solution>` after it, or to the end without a partial closing tag; None without an opening
    tag. `start` and `end` are its span in characters of the text, -1 for None. With `<think>`, `answer` is all text after
    `</think>`, from character `after`; None and -1 while `</think>` is missing.
    """

    outcome: Outcome
    budget: int | None = None
    body: str | None = None
    start: int = -1
    end: int = -1
    answer: str | None = None
    after: int = -1

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """The value of `--budget`: the stated budget (auto), one given in tokens (fixed) or seconds, a multiple of the stated one (scaled)."""

    mode: Literal["auto", "fixed", "scaled", "seconds"]
    value: float | None = None


def parse_format_name(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"--format {name!r} is not known: choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(text: str) -> Format:
    """Return THINK when `<think>` follows the first `</budget>`, else SOLUTION."""
    _, _, rest = text.partition(BUDGET_CLOSE)
    return THINK if rest.lstrip().startswith(THINK.opening) else SOLUTION


def render_budget(budget: int, form: Format = SOLUTION) -> str:
    """Write the opening to prefill for a given budget. Raises InputError unless 1 <= budget <= MAX_BUDGET."""
    if not 1 <= budget <= MAX_BUDGET:
        raise InputError(f"a budget of {budget} tokens is out of range: use 1 to {MAX_BUDGET}")
    return f"{BUDGET_OPEN}{budget}{BUDGET_CLOSE}{form.opening}"


def split_response(response: str, form: Format) -> tuple[str, str]:
    """Split a plain answer into (body, text after the closing tag). With `<think>`, split at its own tags or before its last line.

    Raises ValueError where a tag of the format is left, because the result could not be parsed.
    """
    body, after = response, ""
    if form.answered:
        body, closed, after = response.partition(form.closing)
        if closed and body.lstrip().startswith(form.opening):
            body = body.lstrip().removeprefix(form.opening)
        elif not closed:
            thoughts, line, last = body.rstrip().rpartition("\n")
            body, after = thoughts + line, last
    for part in (body, after):
        if tag := form.tag.search(part):
            raise ValueError(f"the answer holds the tag {tag.group()} at character {tag.start()}")
    return body, after


def parse(text: str) -> Parsed:
    """Parse a completion, in time linear in the text. Never raises."""
    form = detect_format(text)
    tags = list(form.tag.finditer(text))
    fault, budget = _read_budget(text, tags)
    outcome = fault or _read_solution(text, tags, form)
    opened = text.find(form.opening)
    if opened < 0:
        return Parsed(outcome, budget)
    start = opened + len(form.opening)
    closed = text.find(form.closing, start)
    end = closed if closed >= 0 else len(text) - tag_prefix_length(text[start:], form.closing)
    if not form.answered or closed < 0:
        return Parsed(outcome, budget, text[start:end], start, end)
    after = closed + len(form.closing)
    return Parsed(outcome, budget, text[start:end], start, end, text[after:], after)


def body_length(pieces: Sequence[str], parsed: Parsed) -> int:
    """Count the sampled tokens of the body and of the answer after it. `pieces[i]` is the text of token i; joined they were parsed.

    A token that straddles a tag counts when it holds at least one character of body or answer. A token without text counts
    when it lies strictly inside, because byte-level tokens that complete no character are real work.
    """
    count = at = 0
    for piece in pieces:
        end = at + len(piece)
        in_body = parsed.start < parsed.end and at < parsed.end and end > parsed.start
        count += in_body or end > parsed.after >= 0
        at = end
    return count


def parse_budget_option(text: str, seconds: bool = False) -> BudgetChoice:
    """Parse `--budget auto|N|0.5x`, and `30s` where `seconds` are taken. Raises InputError, with the forms, for anything else."""
    word = text.strip()
    if word == "auto":
        return BudgetChoice("auto")
    fault, number = _read_number(word)
    if not fault:
        return BudgetChoice("fixed", float(number))
    scale = SCALE.fullmatch(word)
    if scale and float(scale[1]) > 0 and (seconds or scale[2] == "x"):
        return BudgetChoice("scaled" if scale[2] == "x" else "seconds", float(scale[1]))
    raise InputError(f"--budget {word[:40]!r} is not understood: use {SERVED_FORMS if seconds else BUDGET_FORMS}")


def _read_budget(text: str, tags: list[re.Match[str]]) -> tuple[Outcome | None, int | None]:
    """Check everything up to `</budget>`; returns (fault, budget)."""
    if not text.strip():
        return Outcome.EMPTY, None
    if not tags:
        return (Outcome.CUT if BUDGET_OPEN.startswith(text.lstrip()) else Outcome.NO_BUDGET), None
    if tags[0].group() != BUDGET_OPEN:
        return Outcome.NO_BUDGET, None
    outside = Outcome.TEXT_OUTSIDE if text[: tags[0].start()].strip() else None
    if len(tags) == 1:
        return outside or _read_open_number(text[tags[0].end() :]), None
    if tags[1].group() != BUDGET_CLOSE:
        return outside or Outcome.NESTED_TAG, None
    fault, number = _read_number(text[tags[0].end() : tags[1].start()])
    return outside or fault, number


def _read_number(field: str) -> tuple[Outcome | None, int | None]:
    """Read the content of a closed budget tag; returns (fault, None) or (None, budget)."""
    word = field.strip()
    if not (word.isascii() and word.isdigit()):
        return Outcome.BUDGET_NOT_A_NUMBER, None
    digits = word.lstrip("0")
    if not digits:
        return Outcome.BUDGET_ZERO, None
    # Check the length first: int() takes quadratic time for thousands of digits and refuses more.
    if len(digits) > len(str(MAX_BUDGET)) or int(digits) > MAX_BUDGET:
        return Outcome.BUDGET_HUGE, None
    return None, int(digits)


def _read_open_number(field: str) -> Outcome:
    """Judge a text that ends inside the budget tag: CUT when it can still become a legal budget."""
    closing = tag_prefix_length(field, BUDGET_CLOSE)
    word = field[: len(field) - closing].lstrip()
    may_grow = not closing and word == word.rstrip()
    fault, _ = _read_number(word)
    if may_grow and (not word or fault is Outcome.BUDGET_ZERO):
        return Outcome.CUT
    return fault or Outcome.CUT


def _read_solution(text: str, tags: list[re.Match[str]], form: Format) -> Outcome:
    """Judge everything after a faultless `</budget>`, tags[1]."""
    gap = text[tags[1].end() : tags[2].start() if len(tags) > 2 else len(text)]
    if len(tags) == 2:
        opens = any(f.opening.startswith(gap.lstrip()) for f in FORMATS.values())
        return Outcome.CUT if opens else Outcome.NO_SOLUTION
    if tags[2].group() != form.opening:
        return Outcome.NO_SOLUTION if tags[2].group() == form.closing else Outcome.REPEATED_TAG
    if gap.strip():
        return Outcome.TEXT_OUTSIDE
    if len(tags) == 3:
        return Outcome.CUT
    if tags[3].group() != form.closing:
        return Outcome.NESTED_TAG
    if not form.answered and not text[tags[2].end() : tags[3].start()].strip():
        return Outcome.EMPTY_SOLUTION
    if len(tags) > 4:
        return Outcome.REPEATED_TAG
    outside = bool(text[tags[3].end() :].strip())
    if form.answered:
        return Outcome.OK if outside else Outcome.CUT
    return Outcome.TEXT_OUTSIDE if outside else Outcome.OK


def tag_prefix_length(text: str, tag: str) -> int:
    """Count the characters at the end of `text` that begin `tag`; a whole tag does not count."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
