"""The bodies that wait for a slot: who is next, how much is ahead, and when the queue is full. Pure Python; the caller gives the clock.

Order: `priority`, then stated tokens - c x seconds waited. All age at the same rate, so two that wait never change places: each is filed
once, under stated + the credit at its arrival. The credit grows by c tokens a second, whatever c is at the time, so c may follow what is
measured and nothing is sorted again. No body starves: it goes before all of its priority that come once the credit has grown by its own
stated tokens.
"""

import heapq
import math
from collections import deque
from collections.abc import Hashable, Iterator
from typing import NamedTuple

SERVICES_TO_AGE = 50  # mean services after which a mean body has aged by its own size; 10 cost a third of the gain at one slot (LOG 30)
MEAN_DECAY = 0.99  # of the running means, each body: about the last hundred count
MAX_WAITING = 256
RECENT = 200  # arrivals by which the coming ones are foreseen
PAUSE = 3  # mean gaps without an arrival after which they come more seldom: one gap in twenty is longer by chance
MIB = 2**20


class QueueFull(Exception):
    """No room for one more body. `retry_after`: whole seconds until there should be some, for the header of the 429."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WaitingBody(NamedTuple):
    """Sorts by its first three fields; no two have the same `sequence`."""

    priority: int
    rank: float  # stated + the credit at its arrival, tokens
    sequence: int
    stated: float
    kept_bytes: int
    item: Hashable


class Overtaker(NamedTuple):
    """A kind of newcomer: its tokens, how many come a second, and the seconds until one goes before a waiting body no longer."""

    tokens: float
    per_second: float
    until: float


def rank_first_come(stated: float, length: float, arrival: float) -> float:
    """Rank for first come first served: what the bench compares with."""
    return arrival


def rank_shortest_stated(stated: float, length: float, arrival: float) -> float:
    return stated


def rank_oracle(stated: float, length: float, arrival: float) -> float:
    """Rank by the true length, which nobody has before the end: the most that an order can win in the mean."""
    return length


class BodyQueue:
    """A queue of bodies for `slots` slots. Belongs to one thread. Every `now` is in seconds, and none is before an earlier one.

    `ageing`: c in tokens a second; None: a mean body ages by its size in SERVICES_TO_AGE mean services, by the bodies recorded.
    `max_waiting` and `max_bytes` bound the bodies and the keys and values kept for them; None is no bound.
    """

    def __init__(
        self, slots: int = 1, max_waiting: int | None = MAX_WAITING, max_bytes: int | None = None, ageing: float | None = None
    ) -> None:
        self.slots, self.max_waiting, self.max_bytes, self.fixed_ageing = slots, max_waiting, max_bytes, ageing
        self.kept_bytes = 0
        self._heap: list[WaitingBody] = []
        self._waiting: dict[Hashable, WaitingBody] = {}
        self._places: dict[Hashable, int] | None = None  # from 1; None after a change
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=RECENT)  # arrival, priority, stated
        self._now: float | None = None
        self._credit, self._sequence = 0.0, 0
        self._ageing = ageing or 0.0
        self._bodies = self._stated = self._seconds = 0.0  # decayed sums over the bodies recorded

    def __len__(self) -> int:
        return len(self._heap)

    def __contains__(self, item: Hashable) -> bool:
        return item in self._waiting

    def __iter__(self) -> Iterator[Hashable]:
        """The items, in no order."""
        return iter(self._waiting)

    @property
    def ageing(self) -> float:
        """c, in tokens a second; 0 before the first body is recorded."""
        return self._ageing

    @property
    def mean_stated(self) -> float:
        return self._stated / self._bodies if self._bodies else 0.0

    @property
    def mean_seconds(self) -> float | None:
        """Seconds that a body takes in its slot; None before the first is recorded."""
        return self._seconds / self._bodies if self._bodies else None

    # ---- in and out ----------------------------------------------------------------------------------------------------------------

    def push(
        self, item: Hashable, stated: float | None, now: float, priority: int = 0, kept_bytes: int = 0, rank: float | None = None
    ) -> None:
        """File a body. Raises QueueFull over a bound.

        `stated` None, of a head without a budget, counts as the mean. A lower `priority` goes first, as in vLLM. `rank`: sorts in place of
        what was stated and waited, for a bench; all or none must have one.
        """
        self._advance(now)
        if item in self._waiting:
            raise ValueError(f"{item!r} waits already")
        self.check_room(kept_bytes)
        size = self.mean_stated if stated is None else stated
        body = WaitingBody(priority, size + self._credit if rank is None else rank, self._sequence, size, kept_bytes, item)
        self._sequence += 1
        heapq.heappush(self._heap, body)
        self._waiting[item] = body
        self._recent.append((now, priority, size))
        self.kept_bytes += kept_bytes
        self._places = None

    def pop(self, now: float) -> Hashable:
        """Take out the next body. Raises IndexError if none waits."""
        self._advance(now)
        body = heapq.heappop(self._heap)
        self._forget(body)
        return body.item

    def remove(self, item: Hashable) -> None:
        """Take out a body whose client is gone. Raises KeyError if it does not wait. Its head is referred to no longer."""
        body = self._waiting[item]
        self._heap.remove(body)
        heapq.heapify(self._heap)
        self._forget(body)

    def record_service(self, stated: float, seconds: float, now: float) -> None:
        """Count a body that ended after so many seconds in its slot, for the means and c."""
        self._advance(now)
        self._bodies = self._bodies * MEAN_DECAY + 1
        self._stated = self._stated * MEAN_DECAY + stated
        self._seconds = self._seconds * MEAN_DECAY + seconds
        if self.fixed_ageing is None and self._seconds > 0:
            self._ageing = self._stated / (SERVICES_TO_AGE * self._seconds)

    # ---- where one stands ----------------------------------------------------------------------------------------------------------

    def position(self, item: Hashable, now: float) -> int:
        """Place in the queue; 1 is next. Raises KeyError if it does not wait. Those of all are computed once after a change."""
        self._advance(now)
        if self._places is None:
            self._places = {body.item: place for place, body in enumerate(sorted(self._heap), 1)}
        return self._places[item]

    def sizes_ahead(self, item: Hashable, now: float) -> list[float]:
        """Stated tokens of each that goes before it, the next one first: what `estimate_start` wants."""
        place = self.position(item, now)
        return [body.stated for body in heapq.nsmallest(place - 1, self._heap)]

    def overtakers(self, item: Hashable, now: float) -> list[Overtaker]:
        """Those of the last arrivals whose like would go before it if they came now. Raises KeyError if it does not wait.

        A like of size s comes as often as it did, and overtakes until the credit has grown by what separates the two. After a burst the
        rate falls with the time that nobody comes. Every body must be pushed, also one that finds a slot free.
        """
        self._advance(now)
        body, first, last = self._waiting[item], self._recent[0][0], self._recent[-1][0]
        since = max(now - first, (now - last) * len(self._recent) / PAUSE)
        found = []
        for _, priority, size in self._recent if since > 0 else ():
            ahead = body.rank - self._credit - size
            if priority < body.priority or (priority == body.priority and ahead > 0):
                is_endless = priority < body.priority or not self._ageing
                found.append(Overtaker(size, 1 / since, math.inf if is_endless else ahead / self._ageing))
        return found

    def check_room(self, kept_bytes: int = 0, bodies: int = 1) -> None:
        """Raise QueueFull unless so many more bodies fit. One that is too large to wait can still begin where a slot is free.

        The server asks before it decodes a head, and counts in those that are being decoded.
        """
        surplus = 0 if self.max_waiting is None else len(self._heap) + bodies - self.max_waiting
        too_much = 0 if self.max_bytes is None else self.kept_bytes + kept_bytes - self.max_bytes
        if surplus > 0 or too_much > 0:
            kept = f"the requests that wait keep {self.kept_bytes / MIB:.3g} MiB of {(self.max_bytes or 0) / MIB:.3g}"
            what = f"{len(self._heap)} requests wait" if surplus > 0 else kept
            raise QueueFull(f"the queue is full: {what}", self.seconds_until_room(surplus, too_much))

    def seconds_until_room(self, surplus: int, too_much: int = 0) -> int:
        """Seconds until so many bodies, and so many bytes, have left for a slot: one leaves each mean service / slots.

        Without bytes it may be asked from any thread.
        """
        leaving = max(surplus, 0)
        for left, body in enumerate(sorted(self._heap) if too_much > 0 else (), 1):
            too_much -= body.kept_bytes
            if too_much <= 0:
                leaving = max(leaving, left)
                break
        else:
            leaving = len(self._heap) + 1 if too_much > 0 else leaving  # until all have left and a slot is free
        return max(1, math.ceil(leaving * (self.mean_seconds or 1.0) / self.slots))

    # ---- inside --------------------------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Move the clock on, and give out the credit of the time since."""
        since = 0.0 if self._now is None else now - self._now
        if since < 0:
            raise ValueError(f"the clock went back from {self._now} to {now}")
        self._credit += self._ageing * since
        self._now = now

    def _forget(self, body: WaitingBody) -> None:
        del self._waiting[body.item]
        self.kept_bytes -= body.kept_bytes
        self._places = None
