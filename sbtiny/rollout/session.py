"""The decode loop, opened: requests come, stream and go while others decode. A closed list of requests is a session given all at once."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sbtiny.errors import InputError
from sbtiny.rollout.episode import Episode, Request, Sampling, StopReason, to_episode
from sbtiny.rollout.sampling import counter_uniforms

PART_STEP = 0x9E3779B97F4A7C15  # odd, so that no two parts of an answer have the same seed


class Ticket:
    """A request in a session, and the tokens written for it so far. `episode` is there once it has ended.

    `refusal` says why it ended without one: what decodes it has failed. `logprobs` stays empty unless its sampling asks for them.
    """

    def __init__(self, request: Request, sampling: Sampling, pieces: Sequence[str]) -> None:
        self.request, self.sampling, self.pieces = request, sampling, pieces
        self.enforcer = request.enforcer(pieces)
        self.written: list[int] = []
        self.logprobs: list[float] = []
        self.episode: Episode | None = None
        self.refusal: InputError | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the user has ended it already, so that it need not begin."""
        return self.enforcer is not None and self.enforcer.is_stopped

    def part_seed(self, bits: int, masks: bool = False) -> int:
        """The seed below 2**bits of the part that begins here; with one for all, each part would draw as the first did.

        `masks`: the part is one token, asked again without those that may not stand.
        """
        return (self.request.seed + PART_STEP * (2 * len(self.written) + masks)) % 2**bits

    def append(self, token: int, logprob: float | None, stops: Sequence[bool]) -> StopReason | None:
        """Write one sampled token, or the one its limits force. Returns the stop reason when the answer is over."""
        if self.enforcer is not None:
            outcome = self.enforcer.check_token(token, bool(stops[token]))
            if isinstance(outcome, str):
                return outcome
            token = outcome
        self.written.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if stops[token]:
            return "end"
        return "length" if len(self.written) >= self.request.max_tokens else None

    def append_all(self, token: int, logprob: float | None, stops: Sequence[bool]) -> tuple[StopReason | None, bool]:
        """Append a token for what cannot replace one by itself: a wrap-up that begins in its place is written whole.

        Returns the stop reason, and whether forced tokens stand in its place.
        """
        reason = self.append(token, logprob, stops)
        is_forced = bool(self.enforcer and self.enforcer.injected and self.enforcer.injected[-1])
        while reason is None and is_forced and self.enforcer.forced:
            reason = self.append(token, logprob, stops)
        return reason, is_forced

    def finish(self, reason: StopReason) -> None:
        self.episode = to_episode(self.request, self.written, self.pieces, reason, self.logprobs or None, self.enforcer)


class Session(ABC):
    """Decodes the requests that are in it. One thread owns it; only a request's `interrupt` may be pressed from another."""

    streams = True  # whether tokens can be read between steps, while answers are unfinished
    # That the states of held and of ended answers may take: what the slots leave of the planned memory. None: they take none of ours.
    spare_bytes: int | None = None

    @abstractmethod
    def add(self, request: Request, sampling: Sampling) -> Ticket:
        """Queue a request. Raises InputError for one that this session cannot decode."""

    @abstractmethod
    def step(self) -> list[Ticket]:
        """Decode one token of each running answer. Returns the tickets that ended; their episodes are set, or their refusals."""

    @abstractmethod
    def drop(self, ticket: Ticket) -> None:
        """Forget a request, queued, running or held, without an episode; its slot is free for the next step. One that ended is ignored."""

    @abstractmethod
    def hold(self, ticket: Ticket) -> int:
        """Take a running answer out of its slot and keep its keys and values. Returns their bytes."""

    @abstractmethod
    def resume(self, ticket: Ticket) -> None:
        """Let a held answer go on, in the next free slot."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether a request is queued or running; held ones do not count."""

    def pace(self, written: int) -> float | None:
        """The tokens that each running answer got in the last step, in which all got `written`. None: its time was a prompt's."""
        return 1.0 if written else None


class AskingSession(Session):
    """A session before a decoder that keeps keys and values by itself: a held answer is stopped there, and asked for again later."""

    def __init__(self, make_ticket: Callable[[Request, Sampling], Ticket], capacity: int) -> None:
        self.make_ticket, self.capacity = make_ticket, capacity
        self.queue: deque[Ticket] = deque()
        self.running: dict[Any, Any] = {}
        self.held: set[Ticket] = set()

    def add(self, request: Request, sampling: Sampling) -> Ticket:
        ticket = self.make_ticket(request, sampling)
        check_capacity(request, self.capacity)
        self.queue.append(ticket)
        return ticket

    def resume(self, ticket: Ticket) -> None:
        if ticket not in self.held:
            raise ValueError("this answer is not held")
        self.held.remove(ticket)
        self.queue.appendleft(ticket)

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.queue)


class BatchSession(Session):
    """A session of an engine that decodes closed batches: a step decodes up to `rows` requests to their end, so nothing streams."""

    streams = False

    def __init__(self, decode: Callable[[list[Ticket]], None], make_ticket: Callable[[Request, Sampling], Ticket], rows: int) -> None:
        self.decode, self.make_ticket, self.rows = decode, make_ticket, rows
        self.queue: deque[Ticket] = deque()

    def add(self, request: Request, sampling: Sampling) -> Ticket:
        ticket = self.make_ticket(request, sampling)
        self.queue.append(ticket)
        return ticket

    def step(self) -> list[Ticket]:
        batch = [self.queue.popleft() for _ in range(min(self.rows, len(self.queue)))]
        if batch:
            self.decode(batch)
        return batch

    def drop(self, ticket: Ticket) -> None:
        if ticket in self.queue:
            self.queue.remove(ticket)

    def hold(self, ticket: Ticket) -> int:
        raise InputError("this engine decodes whole batches and cannot hold an answer: use --engine ours")

    def resume(self, ticket: Ticket) -> None:
        raise InputError("this engine decodes whole batches and holds no answer: use --engine ours")

    @property
    def is_busy(self) -> bool:
        return bool(self.queue)


def check_capacity(request: Request, capacity: int) -> None:
    """Raise InputError for a request longer than the session's slots."""
    tokens = len(request.prompt_ids) + request.max_tokens
    if tokens > capacity:
        raise InputError(f"a prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} to write exceed the context of {capacity}")


def uniform_draws(tickets: Sequence[Ticket]) -> np.ndarray:
    """The uniform draws (tickets,) that decide the next token of each answer."""
    seeds = np.array([t.request.seed % 2**64 for t in tickets], dtype=np.uint64)
    return counter_uniforms(seeds, np.array([len(t.written) for t in tickets], dtype=np.uint64))
