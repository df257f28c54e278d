"""Which of several servers gets an answer: the one with the fewest tokens left to write, by what its answers have stated."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sbtiny.budget.remaining import Foretell
from sbtiny.rollout.engines.upstream_dialects import Dialect
from sbtiny.rollout.session import Ticket

DOWN_SECONDS = 10.0  # a server that failed gets new answers last for so long
UNKNOWN_TOKENS = 256  # left of an answer that nothing foretells


@dataclass(eq=False)
class Upstream:
    """A server that decodes for us. `failed_at`: when a stream of it broke last."""

    url: str
    dialect: Dialect
    failed_at: float | None = None

    @property
    def is_down(self) -> bool:
        return self.failed_at is not None and time.perf_counter() - self.failed_at < DOWN_SECONDS


def choose_upstream(
    upstreams: Sequence[Upstream], failed: Sequence[Upstream], tickets: Mapping[Upstream, Sequence[Ticket]], foretell: Foretell
) -> Upstream | None:
    """The least loaded server that has a slot free; None where none has. `tickets`: what each decodes.

    Those in `failed` are left out; those that are down get an answer only where no other is left.
    """
    left = [upstream for upstream in upstreams if upstream not in failed]
    left = [upstream for upstream in left if not upstream.is_down] or left
    free = [upstream for upstream in left if upstream.dialect.slots is None or len(tickets[upstream]) < upstream.dialect.slots]

    def load(upstream: Upstream) -> tuple[int, int]:
        return sum(tokens_left(ticket, foretell) for ticket in tickets[upstream]), len(tickets[upstream])

    return min(free, key=load, default=None)


def tokens_left(ticket: Ticket, foretell: Foretell) -> int:
    """The tokens that an answer still takes: by its budget, by the limit of its wrap-up, or by the guess of who asked."""
    tracker = ticket.enforcer.tracker if ticket.enforcer else None
    if tracker and tracker.wrapped_at is not None:
        return tracker.tokens_until_over
    if tracker and tracker.budget:
        return foretell(tracker.budget, tracker.used).tokens or UNKNOWN_TOKENS
    return min(ticket.request.expected or UNKNOWN_TOKENS, ticket.request.max_tokens)
