"""One answer while it is written: its text as it comes, what it has used, and what is left."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sbtiny.budget.calibration import Calibration, CalibrationAnswer
from sbtiny.budget.online_calibration import OnlineCalibration
from sbtiny.budget.protocol import Format
from sbtiny.budget.remaining import Remaining, estimate_remaining
from sbtiny.budget.seconds import Rate, SecondsLeft, seconds_left
from sbtiny.budget.stream import AnswerSplitter, Part
from sbtiny.errors import InputError
from sbtiny.models.prompt import Message
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.session import Ticket
from sbtiny.serving.ask import Answer, Ask, BudgetSource, Progress

BROKEN_BYTES = "Invalid prefix encountered"  # how DecodeStream's error for them begins


class Reply:
    """A running answer. Iterate over it for its parts; then `answer` is there. `press` asks for the answer now, a second time ends it.

    The assistant that began it feeds it after each step; it can be pressed from any thread. `step` decodes one token of each of the
    assistant's answers, `rate` is their tokens per second. Without a `calibration` there is no promise. Iterating raises InputError for an
    answer that cannot go on; it ends early for one that was dropped.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        prompt: Sequence[int],
        ask: Ask,
        step: Callable[[], object],
        rate: Rate,
        calibration: Calibration | OnlineCalibration | None,
        coverage: float,
    ) -> None:
        self.messages, self.prompt, self.ask, self.step, self.rate = messages, prompt, ask, step, rate
        self.calibration, self.coverage = calibration, ask.coverage or coverage
        self.interrupt, self.started = Interrupt(), time.perf_counter()
        self.head: Ticket | None = None  # asks for the stated budget alone
        self.body: Ticket | None = None
        self.stated: int | None = None
        self.promised: int | None = None  # by its stated budget, when that stood
        self.given: int | None = None
        self.source: BudgetSource = "none"
        self.parts: list[Part] = []  # of the whole answer
        self.pieces: list[str] = []  # its whole text, tags included
        self.thought_tokens = 0
        self.refusal: InputError | None = None  # why it cannot go on
        self.is_dropped = False
        self.first_at: float | None = None
        self.answer: Answer | None = None

    def press(self) -> None:
        self.interrupt.press()

    @property
    def is_done(self) -> bool:
        return self.answer is not None or self.refusal is not None

    def __iter__(self) -> Iterator[Part]:
        """Decode to the end and yield the parts as they come; other answers of the assistant go on beside it."""
        seen = 0
        while True:
            yield from self.parts[seen:]
            seen = len(self.parts)
            if self.refusal is not None:
                raise self.refusal
            if self.is_done or self.is_dropped:
                return
            self.step()

    def wait(self) -> Answer:
        """Decode to the end. Raises InputError for an answer that cannot go on, or was dropped."""
        for _ in self:
            pass
        if self.answer is None:
            raise InputError("this answer was dropped before its end: ask again")
        return self.answer

    def to_calibration(self) -> CalibrationAnswer | None:
        """What this answer tells a calibration about promises; None where it tells nothing.

        1. It must go by a budget that it stated. One that a user gave, also as a multiple or in seconds, is not what was calibrated. A
           coverage is no such budget: the answer states its own and may take what is promised.
        2. One that ended by itself has kept or missed its promise by its length. One that is malformed has missed it, as in calibrating.
        3. One that was cut has missed it where its own overrun was the cause: it reached the end of what its budget allows (the budget
           and its tolerance, or the promise where a coverage was asked for).
        4. One that was cut by a ceiling, by max_tokens, by its time, by a stop text or by its user tells nothing: where the model would
           have ended is not known. One that was dropped has no answer and tells nothing.
        """
        if self.answer is None or self.stated is None or self.given is not None:
            return None
        if self.answer.stop_reason == "end":
            return CalibrationAnswer(self.stated, self.answer.used if self.body.episode.parsed.ok else None)
        limits, by_budget = self.body.enforcer.tracker.limits, self.body.enforcer.tracker.allowed
        is_own = limits.ceiling == self.promise if self.source == "coverage" else by_budget is not None and by_budget < limits.ceiling
        return CalibrationAnswer(self.stated, None, cut=True) if self.answer.stop_reason == "ceiling" and is_own else None

    # ---- called by the assistant ---------------------------------------------------------------------------------------------------

    def take_stated(self, budget: int) -> None:
        """The model has stated its budget. The promise is made now: a calibration that adapts may make others of another."""
        self.stated = budget
        self.promised = None if self.calibration is None else self.calibration.promise(budget, self.coverage)

    def begin_body(self, ticket: Ticket, shown_prefill: str, tokenizer: Tokenizer, form: Format) -> None:
        """The answer itself begins; `shown_prefill` is the text at the end of its prompt that belongs to it."""
        self.tag_tokens = [len(tokenizer.encode(tag, add_special_tokens=False)) for tag in (form.opening, form.closing)]
        self.body, self.read, self.splitter = ticket, 0, AnswerSplitter(shown_prefill)
        self.decoder, self.tokenizer, self.is_inside_character = DecodeStream(skip_special_tokens=False), tokenizer, False

    def advance(self) -> None:
        """Read the tokens written since the last call."""
        ticket = self.body
        end = len(ticket.written) - (ticket.episode is not None and ticket.episode.ended)  # a stop token has no text
        for at in range(self.read, end):
            token, is_forced = ticket.written[at], ticket.enforcer.injected[at]
            if is_forced and self.is_inside_character and not ticket.enforcer.injected[at - 1]:  # cut inside a character, which is left out
                self.decoder = DecodeStream(skip_special_tokens=False)
            self.thought_tokens += self.splitter.kind == "thoughts"
            text = self._decode(token)
            self.is_inside_character = not text
            if text:
                self.pieces.append(text)
                self.parts += self.splitter.feed(text)
        if self.first_at is None and ticket.written:
            self.first_at = time.perf_counter()
        self.read = end
        if self.source == "stated" and self.stated is None and self.splitter.budget is not None:
            self.take_stated(self.splitter.budget)
        if ticket.episode is not None:
            self.parts += self.splitter.close()
            self._finish()

    def _decode(self, token: int) -> str | None:
        """The text of the next token; None inside a character. Bytes that cannot be one begin the text anew, as in vLLM."""
        try:
            return self.decoder.step(self.tokenizer, token)
        except Exception as error:  # tokenizers has no class of its own for it
            if not str(error).startswith(BROKEN_BYTES):
                raise
            self.decoder = DecodeStream(skip_special_tokens=False)
            return self.decoder.step(self.tokenizer, token)

    def _finish(self) -> None:
        episode = self.body.episode
        self.answer = Answer(
            text=self._joined("answer"),
            thoughts=self._joined("thoughts"),
            stated=self.stated,
            given=self.given,
            source=self.source,
            allowed=self.allowed,
            used=episode.length,
            tokens=len(episode.completion_ids),
            promise=self.promise,
            coverage=self.coverage if self.promise is not None else None,
            seconds=time.perf_counter() - self.started,
            stop_reason=episode.stop_reason,
            ended=episode.ended,
        )

    def _joined(self, kind: str) -> str:
        return "".join(part.text for part in self.parts if part.kind == kind).strip()

    # ---- what a count-down shows ---------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int | None:
        """The budget it goes by: the given one, else the stated one once it stands."""
        return self.stated if self.given is None else self.given

    @property
    def awaits_budget(self) -> bool:
        """Whether the model may still state one."""
        return self.body is None or (self.source == "stated" and self.splitter.section == "head")

    @property
    def promise(self) -> int | None:
        """The tokens that hold with a chance of `coverage`, of a calibrated model and a stated budget."""
        return self.promised if self.given is None else None

    @property
    def allowed(self) -> int | None:
        """Body tokens before it is wrapped up; None without a limit."""
        return self.body.enforcer.tracker.allowed if self.body else None

    @property
    def planned(self) -> int | None:
        """The body tokens that the queue goes by: those of its budget that it may take."""
        return self.budget if self.budget is None or self.allowed is None else min(self.budget, self.allowed)

    @property
    def is_answering(self) -> bool:
        """Whether its thoughts are over and the answer after them is written."""
        return self.body is not None and self.body.enforcer.tracker.is_answering

    def progress(self) -> Progress:
        """Where it stands now. Once the user asked for the answer, the reserve is what is left."""
        tracker = self.body.enforcer.tracker if self.body else None
        used = tracker.used if tracker and self.splitter.section != "head" else 0
        if tracker and tracker.wrapped_at is not None:
            reserve = max(0, tracker.wrapped_at + tracker.limits.reserve - used)
            return Progress(self.budget, used, None, 0.0, self._seconds(Remaining(reserve or None, 0, reserve)))
        if self.budget is None:
            return Progress(None, used, None, 0.0, None)
        if self.calibration is not None and self.given is None:
            left = self.calibration.remaining(self.stated, used)
        else:
            left = estimate_remaining(self.budget, used)
        if tracker and tracker.allowed is not None:
            left = keep_within(left, max(0, tracker.allowed + tracker.limits.reserve - used))
        return Progress(self.budget, used, left.tokens, left.over, self._seconds(left, self._tags_left()))

    def _seconds(self, left: Remaining, tags: int = 0) -> SecondsLeft | None:
        """The seconds of the tokens left, and of `tags` more."""
        rate = self.rate.per_second(time.perf_counter())
        if left.tokens is None or not rate:
            return None
        low, high = (None if bound is None else bound + tags for bound in (left.low, left.high))
        steps = Remaining(left.tokens + tags, low, high)
        return seconds_left(steps, rate, self.rate.errors(steps.tokens / rate))

    def _tags_left(self) -> int:
        """The tokens of the tags to come, and the stop token: steps that are no part of the body."""
        if not self.body or self.splitter.section == "after":
            return 1
        head = self.tag_tokens[0] if self.splitter.section == "head" else 0
        return head + max(0, self.tag_tokens[1] - self.body.enforcer.tracker.pending) + 1


def keep_within(left: Remaining, most: int) -> Remaining:
    """What is left where at most so many tokens may come. What is not known stays so."""
    tokens, low, high = (None if n is None else min(n, most) for n in (left.tokens, left.low, left.high))
    return replace(left, tokens=tokens, low=low, high=high)
