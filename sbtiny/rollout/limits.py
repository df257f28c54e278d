"""What may stop an answer: a budget, a ceiling, an interruption. Pure: it sees one token's text at a time and answers.

A body may run to its limit: the ceiling, or the number the answer began with plus a tolerance, whichever is lower. The token that
would go over it is replaced by the wrap-up text; a reserve is left for the answer, then the episode stops. A closing tag just at the
limit still closes, so a kept promise is never cut; at the end of the reserve it has to fit.

What counts is what `Episode.length` counts: the tokens of the body, or every token when the answer is malformed. So

| the answer begins with                   | number   | counted                        |
|------------------------------------------|----------|--------------------------------|
| a legal head                             | it       | the body, then what follows it |
| no budget tag, words before it           | none     | everything                     |
| a budget of zero, no number, too large   | none     | everything                     |
| a legal number, then a second budget tag | the first| everything                     |
| a head that does not end in HEAD_CHARS   | if legal | everything                     |

With no number, the ceiling alone limits; a tag inside the body or after it changes nothing. The answer behind `</think>` counts as the
body does, and has the reserve to itself where the thoughts have used up the limit.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from sbtiny.budget.protocol import BUDGET_OPEN, SOLUTION, THINK, Outcome, parse, partial
from sbtiny.errors import InputError

LimitSource = Literal["self", "user", "ceiling"]
HEAD_CHARS = 64  # the longest legal head without white space has 41
OPENING = re.compile(f"{SOLUTION.opening}|{THINK.opening}")


class Verdict(Enum):
    """GO: the token stands. WRAP_UP: the wrap-up tokens stand in its place. STOP: the answer ends without it."""

    GO = auto()
    WRAP_UP = auto()
    STOP = auto()


class Place(Enum):
    HEAD = auto()
    BODY = auto()
    AFTER = auto()
    LOOSE = auto()  # malformed: there is no body to tell from the rest


@dataclass(frozen=True, slots=True)
class Limits:
    """Body tokens an answer may take.

    `ceiling` holds whatever number the answer says; `tolerance` limits it to that number x (1 + tolerance); None is no limit. At the
    limit the tokens of `wrap_up` are injected; they and the answer after them take at most `reserve` more.
    """

    ceiling: int | None = None
    tolerance: float | None = None
    wrap_up: tuple[int, ...] = ()
    reserve: int = 0

    def __post_init__(self) -> None:
        if self.ceiling is not None and self.ceiling < 0:
            raise InputError(f"a ceiling of {self.ceiling} tokens is below 0: use 0 or more")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise InputError(f"a tolerance of {self.tolerance} must be 0 or more, and finite (0.1 allows 10 % over the budget)")
        if self.reserve < 0 or (self.wrap_up and self.reserve <= len(self.wrap_up)):
            raise InputError(
                f"a reserve of {self.reserve} tokens leaves nothing for the answer after a wrap-up of {len(self.wrap_up)}: raise it"
            )

    def allowed(self, budget: int | None) -> int | None:
        """Body tokens before the wrap-up, when the answer began with this number."""
        over = None if budget is None or self.tolerance is None else math.floor(budget * (1 + self.tolerance))
        return min((n for n in (self.ceiling, over) if n is not None), default=None)

    def source(self, budget: int | None, prefilled: bool) -> LimitSource | None:
        """Whose limit `allowed` is."""
        if (allowed := self.allowed(budget)) is None:
            return None
        if budget is None or self.tolerance is None or allowed < math.floor(budget * (1 + self.tolerance)):
            return "ceiling"
        return "user" if prefilled else "self"


class Control:
    """Follows one answer; `said` is the text it was given to begin with, which is not counted.

    `used` counts the tokens that are surely body; one that may turn out to be the closing tag waits in `pending`.
    """

    def __init__(self, limits: Limits, said: str = "") -> None:
        self.limits, self.head, self.place, self.form = limits, said, Place.HEAD, SOLUTION
        self.budget: int | None = None
        self.used = self.pending = self.seen = 0
        self.tail = ""
        self.wrapped = False
        if said:
            self._read_head(0)

    @property
    def allowed(self) -> int | None:
        return self.limits.allowed(self.budget)

    def see(self, piece: str, forced: bool = False) -> Verdict:
        """The verdict on the next token, by its text; a forced one always stands. A token that does not stand leaves no trace."""
        before = (self.head, self.place, self.budget, self.used, self.pending, self.seen, self.tail)
        self._take(piece)
        if forced or not self._over():
            return Verdict.GO
        room = (self.allowed or 0) + self.limits.reserve - (self.used + self.pending - 1)
        self.head, self.place, self.budget, self.used, self.pending, self.seen, self.tail = before
        if not self.wrapped and self.place is not Place.AFTER and 0 < len(self.limits.wrap_up) < room:
            self.wrapped = True
            return Verdict.WRAP_UP
        return Verdict.STOP

    def _over(self) -> bool:
        if (allowed := self.allowed) is None:
            return False
        answering = self.place is Place.AFTER and self.form.answered
        if not self.wrapped and not answering:
            return self.used > allowed
        return self.used + (self.pending if self.place is not Place.AFTER else 0) > allowed + self.limits.reserve

    def _take(self, piece: str) -> None:
        self.seen += 1
        if self.place is Place.HEAD:
            self.head += piece
            self._read_head(len(piece))
        elif self.place is Place.BODY:
            self._read_body(piece)
        else:  # what follows the tag makes a malformed answer, of which the tag's own tokens count too
            self.used, self.pending = self.used + self.pending + 1, 0

    def _read_head(self, new: int) -> None:
        """Look for the end of the head in `self.head`, whose last `new` characters have just come."""
        opened = OPENING.search(self.head)
        end = opened.end() if opened else len(self.head)
        parsed = parse(self.head[:end])
        legal = parsed.outcome in (Outcome.CUT, Outcome.EMPTY)
        if legal and not opened and len(self.head) <= HEAD_CHARS:
            return
        self.budget = parsed.budget if self.head.lstrip().startswith(BUDGET_OPEN) else None
        if legal and opened:
            self.place, self.form = Place.BODY, THINK if opened.group() == THINK.opening else SOLUTION
            if rest := self.head[max(end, len(self.head) - new) :]:
                self._read_body(rest)
        else:
            self.place, self.used = Place.LOOSE, self.seen

    def _read_body(self, piece: str) -> None:
        text = self.tail + piece
        closed = text.find(self.form.closing)
        if closed >= 0:
            if closed > 0:  # what waited was not this tag
                self.used, self.pending = self.used + self.pending, 0
            last_of_body = closed > len(self.tail)
            self.used += last_of_body
            self.place, self.pending, self.tail = Place.AFTER, self.pending + (not last_of_body), ""
            if self.form.answered:  # the tag's own tokens are never counted, one that goes on into the answer is
                straddles = not last_of_body and len(text) > closed + len(self.form.closing)
                self.used, self.pending = self.used + straddles, 0
            return
        waiting = partial(text, self.form.closing)
        if self.tail and waiting > len(piece):  # the tag goes on: nothing of this token is surely body
            self.pending += 1
        elif waiting and waiting == len(piece):
            self.used, self.pending = self.used + self.pending, 1
        else:
            self.used, self.pending = self.used + self.pending + 1, 0
        self.tail = text[len(text) - waiting :]
