"""A request on its way through the server: what the worker knows of it, and the updates that it tells the socket."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from sbtiny.budget.seconds import SecondsLeft
from sbtiny.budget.stream import Part
from sbtiny.serving.ask import Answer
from sbtiny.serving.reply import Reply
from sbtiny.serving.request_error import RequestError
from sbtiny.serving.requests import ServeRequest
from sbtiny.serving.stop_text import StopText

NO_ANSWER = "(no answer: it was cut before one was written)"
ServeStop = Literal["end", "ceiling", "interrupted", "length", "deadline"]


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """A finished answer and its times in seconds, from its acceptance on."""

    answer: Answer
    stop_reason: ServeStop
    prompt_tokens: int
    queued: float
    first: float
    total: float

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        by_wish = self.answer.ended or self.stop_reason in ("end", "interrupted")
        return "stop" if by_wish else "length"


@dataclass(frozen=True, slots=True)
class Update:
    """News of a job: its text, its budget object, its place in the queue, its end or an error; the tokens are those so far."""

    parts: tuple[Part, ...] = ()
    budget: dict[str, Any] | None = None
    position: int = 0
    eta: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    thought_tokens: int = 0
    outcome: JobOutcome | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        return self.outcome is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A request that was accepted. The loop's thread reads `updates` and `is_open`, all else belongs to the worker's."""

    request: ServeRequest
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    begun: "asyncio.Future[Update]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())  # its first update
    is_open: bool = True
    accepted: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    reply: Reply | None = None
    position: int = 0  # in the queue; 0 while it is decoded
    wait: SecondsLeft | None = None  # until its turn
    filed: float | None = None  # when its body began to wait
    admitted: float | None = None  # when its body got a slot
    most_seconds: float | None = None  # in its slot, before it is wrapped up
    is_late: bool = False

    def __post_init__(self) -> None:
        kind = "chatcmpl" if self.request.prompt is None else "cmpl"
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.stops = StopText(self.request.stop)
        self.sent, self.flushed, self.has_begun, self.has_answer = 0, 0.0, False, False
        self.told = (False, 0)  # whether it is forced and its position, as its reader knows them

    # ---- the worker's --------------------------------------------------------------------------------------------------------------

    @property
    def has_place(self) -> bool:
        """Whether its body waits in the queue or has a slot. Before, its wait is not known."""
        return self.filed is not None or self.admitted is not None

    @property
    def is_forced(self) -> bool:
        """Whether a wrap-up was put into it."""
        return self.reply.body is not None and self.reply.body.enforcer.tracker.wrapped_at is not None

    def has_news(self, now: float, interval: float) -> bool:
        """Whether its reader may have to be told something: its budget, a cut, its place, its end, or text every `interval` seconds."""
        if not self.has_begun or self.reply.is_done or now - self.flushed >= interval:
            return True
        return self.told != (self.is_forced, self.position)

    def take_parts(self, now: float, interval: float) -> tuple[Part, ...]:
        """The text that is new, where `interval` seconds have passed since the last or the answer is done."""
        if self.request.prompt is None:
            fresh = self.reply.parts[self.sent :]
        else:
            fresh = [Part("answer", piece) for piece in self.reply.pieces[self.sent :]]
        if not self.reply.is_done and (not fresh or now - self.flushed < interval):
            return ()
        self.sent, self.flushed = self.sent + len(fresh), now
        parts = [Part(part.kind, self.stops.feed(part.text) if part.kind == "answer" else part.text) for part in join_parts(fresh)]
        if self.reply.is_done:
            parts.append(Part("answer", self.stops.close()))
        self.has_answer = self.has_answer or any(part.kind == "answer" and part.text.strip() for part in parts)
        was_cut = self.reply.answer is not None and self.reply.answer.stop_reason != "end" and not self.stops.is_hit
        if was_cut and not self.has_answer:
            parts.append(Part("answer", NO_ANSWER))
        return tuple(part for part in parts if part.text)

    def outcome(self) -> JobOutcome:
        answer, end = self.reply.answer, time.perf_counter()
        reason: ServeStop = answer.stop_reason
        if self.stops.is_hit:
            reason = "end"
        elif self.is_late and reason == "interrupted":
            reason = "deadline"
        queued = 0.0 if self.filed is None else (self.admitted or end) - self.filed
        first = self.reply.first_at or end
        return JobOutcome(answer, reason, len(self.reply.prompt), queued, first - self.accepted, end - self.accepted)

    def budget_object(self) -> dict[str, Any]:
        """What is known of its budget now, for its reader."""
        reply, at = self.reply, self.reply.progress()
        left = None if reply.is_done else at.seconds
        wait = self.wait if self.position else SecondsLeft(0.0, 0.0, 0.0)
        known = left is not None and wait is not None
        high = wait.high + left.high if known and None not in (wait.high, left.high) else None
        return {
            "predicted": reply.stated,
            "requested": self.request.requested,
            "source": self.request.source,
            "allowed": reply.allowed,
            "used": at.used,
            "remaining": 0 if reply.is_done else at.left,
            "coverage": reply.coverage if reply.promise is not None else None,
            "promise": reply.promise,
            "eta_seconds": 0.0 if reply.is_done else round(wait.seconds + left.seconds, 3) if known else None,
            "eta_low": 0.0 if reply.is_done else round(wait.low + left.low, 3) if known else None,
            "eta_high": 0.0 if reply.is_done else None if high is None else round(high, 3),
            "queue_position": self.position,
            "forced": self.is_forced,
        }


def join_parts(parts: list[Part]) -> list[Part]:
    """Join neighbours of the same kind."""
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].kind == part.kind:
            joined[-1] = Part(part.kind, joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined
