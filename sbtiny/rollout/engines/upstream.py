"""Servers that run elsewhere, with our interface: llama-server, vLLM, ollama (`upstream_dialects`). Their weights are never seen here.

They sample; the limits are ours, by one means for all of them, abort and go on: the stream is closed where the next token may not stand,
and prompt, what was said and the closing text are sent again. Up to its ceiling an answer is asked in one request, so that the server
stops there by itself. An answer whose server dies goes on at another one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sbtiny.errors import InputError, UpstreamError
from sbtiny.rollout.decode_engine import DecodeEngine
from sbtiny.rollout.engines.upstream_balance import Upstream, choose_upstream
from sbtiny.rollout.engines.upstream_dialects import Chunk, Segment
from sbtiny.rollout.engines.upstream_reader import Stream, StreamReader
from sbtiny.rollout.engines.upstream_vocabulary import TagSkip, UpstreamVocabulary
from sbtiny.rollout.episode import Request, Sampling, StopReason
from sbtiny.rollout.session import AskingSession, Ticket

STEP_SECONDS = 0.01  # a step waits so long for the first chunk: whoever calls has other things to do
SPARE = 4  # tokens asked beyond a limit where the last ones came inside a character, which a server may not show
MOST_IDLE = 3  # requests in a row that bring no token that may stand


class UpstreamEngine(DecodeEngine):
    """Decodes at most `slots` answers at once, at a server no more than its own slots.

    `weights`: the fingerprint of what the user says is there.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        reader: StreamReader,
        vocabulary: UpstreamVocabulary,
        slots: int,
        max_positions: int | None,
        weights: str,
    ) -> None:
        self.upstreams, self.reader, self.vocabulary = list(upstreams), reader, vocabulary
        self.pieces, self.stops = vocabulary.pieces, vocabulary.stops
        self.rows, self.weights = slots, weights
        bounds = [max_positions, *(upstream.dialect.context for upstream in upstreams)]
        self.max_positions = min((bound for bound in bounds if bound), default=None)
        self.servers = [f"{upstream.dialect.kind} at {upstream.url}" for upstream in upstreams]
        self.session: UpstreamSession | None = None

    @property
    def fingerprint(self) -> str:
        """The weights that the user names, and what the servers call theirs."""
        names = {upstream.dialect.model.rpartition("/")[2] for upstream in self.upstreams}
        return f"{self.weights}@{'+'.join(sorted(names))}"

    def open_session(self, capacity: int, kept_prefixes: int = 0) -> "UpstreamSession":
        """Open a session; the servers keep prefixes by themselves."""
        if self.session is not None:
            self.session.close()
        self.session = UpstreamSession(self, capacity)
        return self.session

    def close(self) -> None:
        """Close all streams and end the thread that reads them; the engine cannot be used afterwards."""
        if self.session is not None:
            self.session.close()
        self.reader.stop()

    def slot_bytes(self, capacity: int) -> int:
        return 0  # the servers hold them

    def refresh(self) -> None:
        """Do nothing: the servers' weights do not change from here."""

    def check_room(self, tokens: int) -> None:
        if self.max_positions is not None and tokens > self.max_positions:
            raise InputError(f"{tokens} tokens exceed the {self.max_positions} of a slot at the upstream: lower max_tokens")

    def make_ticket(self, request: Request, sampling: Sampling) -> Ticket:
        if sampling.logprobs:
            raise InputError("an upstream gives no log-probabilities that could be trained on: leave --upstream out")
        return super().make_ticket(request, sampling)


@dataclass(eq=False)
class Course:
    """How an answer got on: where it failed since its last token, and requests in a row that brought nothing."""

    failed: list[Upstream] = field(default_factory=list)
    idle: int = 0
    tag_skip: TagSkip = field(default_factory=TagSkip)


class UpstreamSession(AskingSession):
    """Answers that are decoded elsewhere. A step takes what has come."""

    def __init__(self, engine: UpstreamEngine, capacity: int) -> None:
        super().__init__(engine.make_ticket, capacity)
        self.engine = engine
        self.running: dict[Ticket, Stream] = {}
        self.courses: dict[Ticket, Course] = {}
        self.ended: list[Ticket] = []
        self.decoding = 0  # answers that the last step could bring tokens of

    def add(self, request: Request, sampling: Sampling) -> Ticket:
        ticket = super().add(request, sampling)
        self.courses[ticket] = Course()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        if ticket in self.queue:
            self.queue.remove(ticket)
        self.held.discard(ticket)
        self._close(ticket)
        self.courses.pop(ticket, None)

    def hold(self, ticket: Ticket) -> int:
        """Close its stream; nothing of it is kept but its tokens."""
        if ticket in self.queue:
            self.queue.remove(ticket)
        self._close(ticket)
        self.held.add(ticket)
        return 0

    def close(self) -> None:
        """Close all streams."""
        for ticket in [*self.running, *self.queue, *self.held]:
            self.drop(ticket)

    def pace(self, written: int) -> float | None:
        return written / self.decoding if self.decoding else None

    def step(self) -> list[Ticket]:
        """Take what has come, at most a few tokens an answer; wait a moment where nothing has."""
        if self.engine.session is not self:
            raise RuntimeError("another session was opened on this engine: it has one reader")
        self._refill()
        decoding = {ticket for ticket, stream in self.running.items() if stream.shown}
        for stream, news in self.engine.reader.take(STEP_SECONDS if self.running else 0, gathers=len(self.running) > 1):
            if self.running.get(stream.ticket) is not stream:
                continue  # it was closed since
            decoding.add(stream.ticket)
            if isinstance(news, UpstreamError):
                self._move(stream, news)
            else:
                self._write(stream, news)
        for ticket in [ticket for ticket in self.running if ticket.is_stopped]:
            self._end(ticket, "interrupted")
        self.decoding = len(decoding)
        ended, self.ended = self.ended, []
        return ended

    # ---- where an answer is decoded ------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Ask for the answers that wait, each at the server with the least to do."""
        for ticket in [ticket for ticket in self.queue if ticket.is_stopped]:
            self.queue.remove(ticket)
            self._end(ticket, "interrupted")
        for ticket in list(self.queue):
            if len(self.running) >= self.engine.rows:
                return
            failed = self.courses[ticket].failed
            tickets = {u: [t for t, stream in self.running.items() if stream.upstream is u] for u in self.engine.upstreams}
            upstream = choose_upstream(self.engine.upstreams, failed, tickets, self.engine.foretell)
            if upstream is not None:
                self.queue.remove(ticket)
                self._ask(ticket, upstream)
            elif not failed:  # no server is free; one that has failed this answer might be, for others
                return

    def _move(self, stream: Stream, error: UpstreamError) -> None:
        """A server has failed: its answer goes on at another one, or ends with the error."""
        ticket, course = stream.ticket, self.courses[stream.ticket]
        course.failed.append(stream.upstream)
        if not error.is_refusal:
            stream.upstream.failed_at = time.perf_counter()
        self._close(ticket)
        if error.is_refusal or all(upstream in course.failed for upstream in self.engine.upstreams):
            ticket.refusal = error
            self._leave(ticket)
        else:
            self.queue.appendleft(ticket)

    # ---- one answer ----------------------------------------------------------------------------------------------------------------

    def _ask(self, ticket: Ticket, upstream: Upstream, spare: int = 0, masks_all: bool = False) -> None:
        """Ask a server to go on with an answer: as far as its limits surely allow, and `spare` tokens more.

        `masks_all`: ask one token, for which every token of a second closing tag is masked.
        """
        request, enforcer = ticket.request, ticket.enforcer
        room = request.max_tokens - len(ticket.written) + spare
        if enforcer is not None and (over := enforcer.tracker.tokens_until_over) is not None:
            room = min(room, over + spare)
        segment = Segment(
            prompt=(*request.prompt_ids, *ticket.written),
            tokens=1 if masks_all else room,
            sampling=ticket.sampling,
            seed=ticket.part_seed(31, masks_all),
            context=self.capacity,
            masked=self.engine.vocabulary.tag_mask.masked_tokens(enforcer, begun=masks_all) if upstream.dialect.masks else (),
            priority=enforcer.tracker.budget or 0 if enforcer else 0,
        )
        self.running[ticket] = stream = Stream(ticket, upstream, segment, len(ticket.written))
        self.engine.reader.open(stream)

    def _ask_again(self, stream: Stream, spare: int = 0, masks_all: bool = False) -> None:
        self._close(stream.ticket)
        self._ask(stream.ticket, stream.upstream, spare, masks_all)

    def _write(self, stream: Stream, chunk: Chunk) -> None:
        """Write the tokens of a chunk, until the answer ends or goes on in another way."""
        ticket, course, vocabulary = stream.ticket, self.courses[stream.ticket], self.engine.vocabulary
        masks = stream.upstream.dialect.masks
        try:
            tokens = vocabulary.read_tokens(chunk, stream.shown)
        except UpstreamError as error:
            return self._move(stream, error)
        stream.shown += len(tokens)
        for token in tokens:
            if not masks and course.tag_skip.leaves_out(vocabulary, ticket, token):
                continue
            if masks and token in vocabulary.tag_mask.masked_tokens(ticket.enforcer):
                if not self._gives_up(stream, "writes tokens that it was told not to: start it without speculative decoding"):
                    self._ask_again(stream, masks_all=True)
                return
            reason, is_forced = ticket.append_all(token, None, self.engine.stops)
            if reason:
                return self._end(ticket, reason)
            course.failed, course.idle = [], 0
            if is_forced:
                return self._ask_again(stream)  # the server goes on after the closing text
        if chunk.end == "stop":
            self._end(ticket, ticket.append(vocabulary.stop_id, None, self.engine.stops) or "end")
        elif chunk.end == "length":
            self._go_on(stream, chunk)
        elif stream.upstream.dialect.schedules and ticket.enforcer and (ticket.enforcer.tracker.budget or 0) != stream.segment.priority:
            self._ask_again(stream)  # its budget stands: the server orders by it

    def _go_on(self, stream: Stream, chunk: Chunk) -> None:
        """The server has written what it was asked for."""
        ticket, course = stream.ticket, self.courses[stream.ticket]
        if len(ticket.written) == stream.begun_at and self._gives_up(stream, "writes nothing: is it the same model?"):
            return
        hidden = chunk.count is not None and chunk.count > stream.shown
        pending = ticket.enforcer is not None and ticket.enforcer.tracker.pending
        self._ask_again(stream, spare=SPARE if hidden or pending or course.idle else 0)

    def _gives_up(self, stream: Stream, fault: str) -> bool:
        """Count a request that brought nothing. One too many in a row, and the answer ends with the fault."""
        course = self.courses[stream.ticket]
        course.idle += 1
        is_over = course.idle > MOST_IDLE
        if is_over:
            self._move(stream, UpstreamError(f"upstream {stream.upstream.url} {fault}", True))
        return is_over

    def _end(self, ticket: Ticket, reason: StopReason) -> None:
        self._close(ticket)
        ticket.finish(reason)
        self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self.courses.pop(ticket, None)
        self.ended.append(ticket)

    def _close(self, ticket: Ticket) -> None:
        if (stream := self.running.pop(ticket, None)) is not None:
            self.engine.reader.close(stream)
