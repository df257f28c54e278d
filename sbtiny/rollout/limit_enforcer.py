"""Forces and ends answers inside the decode loop: limits, "answer now", and no second closing tag after a forced one."""

from collections import deque
from collections.abc import Sequence
from typing import Literal

from sbtiny.budget.protocol import tag_prefix_length
from sbtiny.rollout.limits import AnswerSection, Limits, LimitTracker, Verdict
from sbtiny.rollout.token_pieces import FRAGMENT, TokenPieces, missing_bytes

SAFE_POINT_SHARE, SAFE_POINT_TOKENS = 0.1, 16  # wait for a safe point: this share of the budget or so many tokens, whichever is more
MOST_MISSING = 3  # bytes, so tokens, that a begun character may lack


class Interrupt:
    """The wish to end an answer early. Set it from any thread or signal handler; the decode loop reads it once a step.

    The first press asks for the answer now, the second ends it where it is.
    """

    def __init__(self) -> None:
        self.presses = 0

    def press(self) -> None:
        self.presses += 1

    def stop(self) -> None:
        """Press as often as it takes to end the answer."""
        self.presses = 2


class LimitEnforcer:
    """Replaces or refuses the sampled tokens of an answer that has limits or may be interrupted.

    `pieces[i]` is the text of token i. `injected` gets a mark for each token written: whether it was forced. `cause` says why a wrap-up
    was injected.
    """

    def __init__(self, limits: Limits, prefill: str, interrupt: Interrupt | None, pieces: Sequence[str]) -> None:
        self.tracker, self.interrupt, self.pieces = LimitTracker(limits, prefill), interrupt, pieces
        self.fragments = pieces.fragments if isinstance(pieces, TokenPieces) else {}
        self.forced: deque[int] = deque()
        self.injected: list[bool] = []
        self.cause: Literal["ceiling", "interrupted"] | None = None
        self.text_end = ""  # the last characters written
        self.missing = 0  # bytes that the last character lacks
        self.waited = 0  # tokens since the first press
        self.closed_by_force = False
        self.tag_matched = 0  # characters of a second closing tag at the end of the text

    @property
    def is_stopped(self) -> bool:
        """Whether the user ends the answer here: by the second press, or by the first where nothing is left to wrap up."""
        presses, tracker = self.interrupt.presses if self.interrupt else 0, self.tracker
        if presses != 1 or tracker.wrapped_at is not None:
            return presses > 1
        closed_before = tracker.section is AnswerSection.AFTER and not self.waited
        return closed_before or not tracker.wrap_up

    def check_token(self, token: int, stop: bool) -> int | Literal["ceiling", "interrupted"]:
        """The token to write for the sampled one, or the reason why the answer ends without it. `stop`: it is a stop token."""
        if self.is_stopped:
            return "interrupted"
        if not self.forced and not stop:
            verdict = self._judge(self.pieces[token])
            if verdict is Verdict.STOP:
                return self.cause or "ceiling"
            if verdict is Verdict.WRAP_UP:
                self.forced.extend(self.tracker.wrap_up)
        self.injected.append(bool(self.forced))
        if self.forced:
            token, stop = self.forced.popleft(), False  # a wrap-up holds no stop token
            self.tracker.check_token(self.pieces[token], forced=True)
        if not stop:
            fragment = self.fragments.get(token)
            self.missing = missing_bytes(fragment, self.missing) if fragment else 0
            self._note(self.pieces[token])
        return token

    def _judge(self, piece: str) -> Verdict:
        if self.interrupt and self.interrupt.presses and self.tracker.wrapped_at is None:
            closed = self.tracker.section is AnswerSection.AFTER  # by itself, after the press: the rest has the reserve as well
            if closed or self._is_safe_point(piece):
                self.tracker.wrap_up_here()
                self.cause = "interrupted"
                if not closed:
                    return Verdict.WRAP_UP
        verdict = self.tracker.check_token(piece)
        if verdict is Verdict.WRAP_UP:
            self.cause = "ceiling"
        return verdict

    def _is_safe_point(self, piece: str) -> bool:
        """Whether the text may be interrupted before `piece`: at the end of a line or sentence, or anywhere after the longest wait.

        Never inside a character or a closing tag, and inside the head only after that wait.
        """
        tracker = self.tracker
        waited, self.waited = self.waited, self.waited + 1
        if tracker.pending or tag_prefix_length(piece, tracker.form.closing) == len(piece):
            return False
        longest = max(SAFE_POINT_TOKENS, int(SAFE_POINT_SHARE * (tracker.budget or 0)))
        if waited >= longest:  # an open character here is a broken one: none is begun so late
            return True
        if self.missing:
            return False
        if waited >= longest - MOST_MISSING and piece.endswith(FRAGMENT):
            return True
        if tracker.section is AnswerSection.HEAD:
            return False
        ends_sentence = self.text_end.rstrip("\"')]}*").endswith((".", "!", "?")) and piece[:1].isspace()
        return tracker.used == 0 or self.text_end.endswith("\n") or ends_sentence

    def _note(self, piece: str) -> None:
        self.text_end = (self.text_end + piece)[-8:]
        closed, closing = self.closed_by_force, self.tracker.form.closing
        if self.injected[-1] and self.tracker.form.answered:
            self.closed_by_force = self.tracker.section is AnswerSection.AFTER
        if closed:
            self.tag_matched = tag_prefix_length(closing[: self.tag_matched] + piece, closing)

    @property
    def masked_tag(self) -> tuple[str, int] | None:
        """The closing tag that must not come a second time, and how many of its characters stand already. None: nothing is masked.

        A model does not know that it was closed by force, and closes again (llama.cpp #28182).
        """
        return (self.tracker.form.closing, self.tag_matched) if self.closed_by_force and not self.forced else None
