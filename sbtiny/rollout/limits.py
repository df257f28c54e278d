"""Limits of one answer: its budget with a tolerance, a ceiling, an interruption. No torch: text goes in, verdicts come out.

A body may run to its limit: the ceiling, or the budget plus its tolerance, whichever is lower. The token that would pass the limit is
replaced by the wrap-up text. A reserve of tokens is left for the answer, then the episode stops. A closing tag right at the limit still
closes, so an answer within its budget is never cut. At the end of the reserve the tag has to fit.

The count is that of `Episode.length`: the tokens of the body, or every token of a malformed answer. So

| the answer begins with                   | budget    | counted                        |
|------------------------------------------|-----------|--------------------------------|
| a legal head                             | its own   | the body, then what follows it |
| words before any budget tag              | none      | everything                     |
| a budget of zero, no number, too large   | none      | everything                     |
| a legal budget, then another budget tag  | the first | everything                     |
| a head that does not end in HEAD_CHARS   | if legal  | everything                     |

Without a budget only the ceiling limits. A tag in the body or after it changes nothing. The answer after `</think>` counts like the
body; it has the reserve to itself where the thoughts used up the limit.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum, auto

from sbtiny.budget.protocol import BUDGET_OPEN, SOLUTION, THINK, Outcome, parse, tag_prefix_length
from sbtiny.errors import InputError

HEAD_CHARS = 64  # the longest legal head without white space has 41, and no head has more tokens
OPENING = re.compile(f"{SOLUTION.opening}|{THINK.opening}")


class Verdict(Enum):
    """GO: the token stands. WRAP_UP: the wrap-up tokens stand in its place. STOP: the answer ends without it."""

    GO = auto()
    WRAP_UP = auto()
    STOP = auto()


class AnswerSection(Enum):
    HEAD = auto()
    BODY = auto()
    AFTER = auto()
    LOOSE = auto()  # malformed: no body can be told from the rest


@dataclass(frozen=True, slots=True)
class Limits:
    """Body tokens an answer may take; None is no limit.

    `ceiling` holds for every budget; `tolerance` limits the body to budget x (1 + tolerance). At the limit the tokens of `wrap_up` are
    injected, or those of `thoughts_wrap_up` where there are any and thoughts are open. They and the answer after them take at most
    `reserve` more tokens.
    """

    ceiling: int | None = None
    tolerance: float | None = None
    wrap_up: tuple[int, ...] = ()
    reserve: int = 0
    thoughts_wrap_up: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.ceiling is not None and self.ceiling < 0:
            raise InputError(f"a ceiling of {self.ceiling} tokens is below 0: use 0 or more")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise InputError(f"a tolerance of {self.tolerance} must be 0 or more, and finite (0.1 allows 10 % over the budget)")
        longest = max(len(self.wrap_up), len(self.thoughts_wrap_up))
        if self.reserve < 0 or (longest and self.reserve <= longest):
            raise InputError(f"a reserve of {self.reserve} tokens leaves nothing for the answer after a wrap-up of {longest}: raise it")

    def allowed(self, budget: int | None) -> int | None:
        """Body tokens before the wrap-up of an answer with this budget."""
        if budget is None or self.tolerance is None:
            return self.ceiling
        tolerated = math.floor(budget * (1 + self.tolerance))
        return tolerated if self.ceiling is None else min(self.ceiling, tolerated)


class LimitTracker:
    """Counts the tokens of one answer against its limits. `prefill` is the text it was given to begin with; it is not counted.

    `used` counts the tokens that surely belong to the body. `pending` counts those that may turn out to be the closing tag.
    """

    def __init__(self, limits: Limits, prefill: str = "") -> None:
        self.limits, self.head, self.section, self.form = limits, prefill, AnswerSection.HEAD, SOLUTION
        self.budget: int | None = None
        self.used = self.pending = self.seen = 0
        self.tail = ""
        self.wrapped_at: int | None = None  # body tokens before the wrap-up
        if prefill:
            self._read_head(len(prefill))
            self.used = self.pending = 0

    @property
    def allowed(self) -> int | None:
        return self.limits.allowed(self.budget)

    @property
    def tokens_until_over(self) -> int | None:
        """The number of the next token that may pass the limit, counted from here; None while no limit is known.

        Within the head it has room for the rest of one, so the limit may be passed a few tokens earlier.
        """
        if (most := self._most) is None:
            return None
        head = HEAD_CHARS if self.section is AnswerSection.HEAD else 0
        return max(1, most + head + 1 - self.used - self.pending)

    def check_token(self, piece: str, forced: bool = False) -> Verdict:
        """Judge the next token by its text. A forced token always stands. A token that does not stand leaves the state unchanged."""
        if self._has_room():  # nearly always: the judgement runs at each token of each answer
            self._take(piece)
            return Verdict.GO
        before = (self.head, self.section, self.form, self.budget, self.used, self.pending, self.seen, self.tail)
        self._take(piece)
        if forced or not self._over():
            return Verdict.GO
        allowed = self.allowed or 0  # of a budget that may show with this very token, and is undone with it
        room = allowed + self.limits.reserve - (self.used + self.pending - 1)
        self.head, self.section, self.form, self.budget, self.used, self.pending, self.seen, self.tail = before
        if self.may_wrap_up and len(self.wrap_up) < room:
            self.wrapped_at = allowed
            return Verdict.WRAP_UP
        return Verdict.STOP

    @property
    def wrap_up(self) -> tuple[int, ...]:
        """The wrap-up that fits here."""
        return (self.form.answered and self.limits.thoughts_wrap_up) or self.limits.wrap_up

    @property
    def is_answering(self) -> bool:
        """Whether thoughts are over and the answer after them is written."""
        return self.section is AnswerSection.AFTER and self.form.answered

    @property
    def may_wrap_up(self) -> bool:
        """Whether there is a wrap-up that still has a place: none was injected, and the body is not closed."""
        return bool(self.wrap_up) and self.wrapped_at is None and self.section is not AnswerSection.AFTER

    def wrap_up_here(self) -> None:
        """Begin the wrap-up before the limit is reached. From here on `reserve` tokens are left."""
        self.wrapped_at = self.used + self.pending

    @property
    def _most(self) -> int | None:
        """Tokens that may stand now; the reserve is among them from a wrap-up on, and in the answer after thoughts."""
        allowed = self.allowed if self.wrapped_at is None else self.wrapped_at
        has_reserve = self.wrapped_at is not None or self.is_answering
        return allowed + self.limits.reserve if has_reserve and allowed is not None else allowed

    def _has_room(self) -> bool:
        """Whether the next token surely stays within the limit, whatever it is. In the head it may show the limit, and be over it."""
        return self.section is not AnswerSection.HEAD and ((most := self._most) is None or self.used + self.pending < most)

    def _over(self) -> bool:
        counts_pending = self.wrapped_at is not None and self.section is not AnswerSection.AFTER
        return (most := self._most) is not None and self.used + counts_pending * self.pending > most

    def _take(self, piece: str) -> None:
        self.seen += 1
        if self.section is AnswerSection.HEAD:
            self.head += piece
            self._read_head(len(piece))
        elif self.section is AnswerSection.BODY:
            self._read_body(piece)
        else:  # text after the tag makes the answer malformed, so the tag's own tokens count too
            self.used, self.pending = self.used + self.pending + 1, 0

    def _read_head(self, new: int) -> None:
        """Look for the end of the head in `self.head`; its last `new` characters are new."""
        opening = OPENING.search(self.head)
        end = opening.end() if opening else len(self.head)
        parsed = parse(self.head[:end])
        bare = self.head[:end].lstrip()  # thoughts without a budget, of a model that was not trained to state one
        legal = parsed.outcome in (Outcome.CUT, Outcome.EMPTY) or THINK.opening.startswith(bare)
        if legal and not opening and len(self.head) <= HEAD_CHARS:
            return
        self.budget = parsed.budget if self.head.lstrip().startswith(BUDGET_OPEN) else None
        if legal and opening:
            self.section, self.form = AnswerSection.BODY, THINK if opening.group() == THINK.opening else SOLUTION
            if rest := self.head[max(end, len(self.head) - new) :]:
                self._read_body(rest)
        else:
            self.section, self.used = AnswerSection.LOOSE, self.seen

    def _read_body(self, piece: str) -> None:
        text = self.tail + piece
        closing_at = text.find(self.form.closing)
        if closing_at >= 0:
            if closing_at > 0:  # the pending tokens were not this tag
                self.used, self.pending = self.used + self.pending, 0
            last_of_body = closing_at > len(self.tail)
            self.used += last_of_body
            self.section, self.pending, self.tail = AnswerSection.AFTER, self.pending + (not last_of_body), ""
            if self.form.answered:  # a token of the tag is counted only if it goes on into the answer
                straddles = not last_of_body and len(text) > closing_at + len(self.form.closing)
                self.used, self.pending = self.used + straddles, 0
            return
        waiting = tag_prefix_length(text, self.form.closing)
        if self.tail and waiting > len(piece):  # the tag goes on: no character of this token is surely body
            self.pending += 1
        elif waiting and waiting == len(piece):
            self.used, self.pending = self.used + self.pending, 1
        else:
            self.used, self.pending = self.used + self.pending + 1, 0
        self.tail = text[len(text) - waiting :]
