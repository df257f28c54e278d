"""Heads first, bodies by their budget: every answer's stated budget is decoded at once, then its body waits for a slot in that order.

A head is a prompt and some six tokens. Its keys and values are kept while its body waits, so that nothing is computed twice.
"""

from collections.abc import Callable
from dataclasses import replace

from sbtiny.budget.seconds import SecondsLeft
from sbtiny.config import Settings
from sbtiny.rollout.session import Session
from sbtiny.serving.eta import estimate_start
from sbtiny.serving.queue import BodyQueue, QueueFull
from sbtiny.serving.reply import Reply

HEAD_ROWS = 4  # rows of the engine beyond the slots, so that a head does not wait for a body


def add_head_rows(settings: Settings) -> Settings:
    """The settings with HEAD_ROWS rows more than the slots of `serve.max_num_seqs`."""
    return replace(settings, serve=replace(settings.serve, max_num_seqs=settings.serve.max_num_seqs + HEAD_ROWS))


class HeadsFirst:
    """Decides after each step which answers go on. `engine_rows` are all rows; bodies get all but HEAD_ROWS of them, and one at least.

    `max_waiting` bounds the bodies that wait, None does not; the keys and values that are kept for them are bounded by what the session's
    slots have left of the memory. `head_limit`: tokens after which an answer without a budget counts as a body. A bench may set `rank`,
    another order, while nothing waits.
    """

    def __init__(self, session: Session, engine_rows: int, bytes_per_token: int, max_waiting: int | None, head_limit: int) -> None:
        self.session, self.bytes_per_token, self.head_limit = session, bytes_per_token, head_limit
        self.slots = max(1, engine_rows - HEAD_ROWS)
        self.queue = BodyQueue(self.slots, max_waiting, session.spare_bytes)
        self.rank: Callable[[Reply], float] | None = None
        self.heads: dict[Reply, int] = {}  # being decoded, with their priority
        self.bodies: dict[Reply, float] = {}  # being decoded, with the time they began

    def check_room(self, prompt_tokens: int) -> None:
        """Raise QueueFull where one more answer would have no room to wait. Of the heads that stand soon the longest are taken to wait."""
        free = max(0, self.slots - len(self.bodies))
        if (waiting := len(self.heads) + 1 - free) > 0:
            prompts = sorted([prompt_tokens, *(len(reply.prompt) for reply in self.heads)])[-waiting:]
            self.queue.check_room((sum(prompts) + waiting * self.head_limit) * self.bytes_per_token, bodies=waiting)

    def add(self, reply: Reply, priority: int = 0) -> None:
        self.heads[reply] = priority

    def drop(self, reply: Reply) -> None:
        """Forget an answer, wherever it is; the session is told by others."""
        self.heads.pop(reply, None)
        self.bodies.pop(reply, None)
        if reply in self.queue:
            self.queue.remove(reply)

    def after_step(self, now: float) -> None:
        """File the heads that stand, count the bodies that ended, and let the next bodies into the free slots."""
        for reply in [r for r in self.bodies if r.is_done]:
            began = self.bodies.pop(reply)
            if reply.answer is not None:
                self.queue.record_service(reply.planned or reply.answer.tokens, now - began, now)
        filed = [reply for reply in self.heads if reply.is_done or self._is_standing(reply)]
        fresh = [reply for reply in filed if not reply.is_done and self._file(reply, self.heads[reply], now)]
        for reply in filed:
            del self.heads[reply]
        for reply in self._next_bodies(now):
            self.bodies[reply] = now
            if reply in fresh:
                fresh.remove(reply)
            else:
                self.session.resume(reply.body)
        for reply in fresh:
            self.session.hold(reply.body)

    def _file(self, reply: Reply, priority: int, now: float) -> bool:
        """Queue a body. Where the queue has become full since it was let in, it goes on at once: False."""
        try:
            tokens = len(reply.body.request.prompt_ids) + len(reply.body.written)
            rank = None if self.rank is None else self.rank(reply)
            self.queue.push(reply, reply.planned, now, priority, tokens * self.bytes_per_token, rank)
        except QueueFull:
            self.bodies[reply] = now
            return False
        return True

    def _next_bodies(self, now: float) -> list[Reply]:
        """Take out the bodies that go on: those whose reader wants the answer now, and the first ones while slots are free."""
        pressed = [reply for reply in self.queue if reply.interrupt.presses]
        for reply in pressed:
            self.queue.remove(reply)
        free = self.slots - len(self.bodies) - len(pressed)
        return pressed + [self.queue.pop(now) for _ in range(min(free, len(self.queue)))]

    def foresee(self, rate: float | None, now: float) -> dict[Reply, tuple[int, SecondsLeft | None]]:
        """Position in the queue, and seconds until its body begins, with their band, of each that waits; None without a rate."""
        running = self._tokens_left() if rate and len(self.queue) else []

        def start_of(reply: Reply) -> SecondsLeft | None:
            ahead, overtakers = self.queue.sizes_ahead(reply, now), self.queue.overtakers(reply, now)
            return estimate_start(ahead, running, self.slots, rate, overtakers) if rate else None

        return {reply: (self.queue.position(reply, now), start_of(reply)) for reply in self.queue}

    def _tokens_left(self) -> list[float]:
        """Tokens left of each running body; the mean where nothing foretells them."""
        known = [left for body in self.bodies if (left := body.progress().left) is not None]
        return known + [self.queue.mean_stated] * (len(self.bodies) - len(known))

    def _is_standing(self, reply: Reply) -> bool:
        """Whether a head is whole: its budget stands, or none comes."""
        if reply.body is None or not reply.body.written:
            return False
        return reply.budget is not None or reply.source == "none" or len(reply.body.written) >= self.head_limit
