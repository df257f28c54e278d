"""The state of our decode loop: which ticket is in which slot, the inputs of a step, and prompts computed ahead."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbtiny.models.shapes import PREFILL_BATCH, PREFILL_PLACES
from sbtiny.rollout.session import Ticket

CPU_BLOCK = 32  # slots that attend together on a CPU
MIN_PREFIX = 16  # a shorter common beginning is computed again: that takes no longer than to look for it

Tokens = tuple[int, ...]
Prefill = Callable[[list[Tokens], Tensor | None], list[Tensor]]  # prompts, state of their beginning -> states without the last token


class Scheduler:
    """Assigns tickets to slots and keeps the queue. Active slots are always the first ones.

    A state is the keys and values of a sequence, (layers, 2, kv heads, tokens, head_dim). `cache` is (layers, 2, slots, kv heads,
    capacity, head_dim). `kept_prefixes` states of ended answers are kept for prompts that go on from them, as long as all states beside
    the slots take at most `spare_bytes`.
    """

    def __init__(self, cache: Tensor, prefill: Prefill, kept_prefixes: int = 0, spare_bytes: int = 0) -> None:
        self.cache, self.prefill, self.kept_prefixes, self.spare_bytes = cache, prefill, kept_prefixes, spare_bytes
        self.slots: list[Ticket] = []
        self.queue: deque[Ticket] = deque()
        self.waiting: Counter[Tokens] = Counter()  # queued tickets by prompt
        self.prefilled: dict[Tokens, Tensor] = {}
        self.kept: OrderedDict[Tokens, Tensor] = OrderedDict()
        self.held: dict[Ticket, Tensor] = {}  # states of answers that wait to go on
        rows = cache.shape[2]
        self.block = block_size(rows, cache.device)
        self.tokens, self.positions = (np.zeros(rows, dtype=np.int64) for _ in range(2))

    def add(self, ticket: Ticket) -> None:
        self.queue.append(ticket)
        self.waiting[ticket.request.prompt_ids] += 1

    def drop(self, ticket: Ticket) -> None:
        """Forget a ticket, queued, active or held."""
        held = self.held.pop(ticket, None) is not None
        if ticket in self.slots:
            self._compact(self.slots.index(ticket))
        elif ticket in self.queue:
            self.queue.remove(ticket)
            if not held:
                self._forget(ticket.request.prompt_ids)

    def hold(self, ticket: Ticket) -> int:
        """Move an active ticket's state aside, in place of kept ones where it needs their room. Returns its bytes."""
        slot = self.slots.index(ticket)
        state = self.cache[:, :, slot, :, : self.positions[slot]]
        self._drop_kept(self.kept_prefixes, self.spare_bytes - state.nbytes)
        self.held[ticket] = state.clone()
        self._compact(slot)
        return state.nbytes

    def resume(self, ticket: Ticket) -> None:
        """Queue a held ticket again, before those that have not begun."""
        if ticket not in self.held:
            raise ValueError("this answer is not held")
        self.queue.appendleft(ticket)

    def refill(self) -> list[Ticket]:
        """Fill free slots from the queue. Returns the tickets that the user stopped before they began."""
        stopped = []
        while self.queue and len(self.slots) < self.cache.shape[2]:
            ticket = self.queue[0]  # it stays there where its prompt cannot be computed now
            if (state := self.held.pop(ticket, None)) is not None:
                self._admit(ticket, state)
            elif ticket.is_stopped:
                self._forget(ticket.request.prompt_ids)
                ticket.finish("interrupted")
                stopped.append(ticket)
            else:
                self._admit(ticket, self._prompt_state(ticket.request.prompt_ids))
            self.queue.popleft()
        return stopped

    def _forget(self, prompt: Tokens) -> None:
        """Count one ticket less that waits for this prompt; after the last, drop its state."""
        self.waiting[prompt] -= 1
        if not self.waiting[prompt]:
            self.prefilled.pop(prompt, None)
            del self.waiting[prompt]

    def _prompt_state(self, prompt: Tokens) -> Tensor:
        """The state of a prompt, for one of the tickets that wait for it."""
        if prompt not in self.prefilled:
            self._prefill_ahead(prompt)
        state = self.prefilled[prompt]
        self._forget(prompt)
        return state

    def _admit(self, ticket: Ticket, state: Tensor) -> None:
        """Put a ticket into the first free slot; `state` is that of all its tokens but the last."""
        slot, fed = len(self.slots), state.shape[-2]
        cache = self.cache[:, :, slot]
        cache[..., fed:, :] = 0  # masked positions are read too, and 0 x NaN of an earlier request would be NaN
        cache[..., :fed, :] = state
        last = ticket.written[-1] if ticket.written else ticket.request.prompt_ids[-1]
        self.tokens[slot], self.positions[slot] = last, fed
        self.slots.append(ticket)

    def _prefill_ahead(self, prompt: Tokens) -> None:
        """Compute this prompt and the next ones of the queue in one call, which is faster than many small ones."""
        if self.kept_prefixes and (state := self._find_beginning(prompt)) is not None:
            self.prefilled[prompt] = self.prefill([prompt], state)[0]
            return
        coming = [t.request.prompt_ids for t in islice(self.queue, 4 * PREFILL_BATCH) if t not in self.held]
        fresh = fit_prefill(dict.fromkeys([prompt, *(p for p in coming if p not in self.prefilled)]))
        self.prefilled.update(zip(fresh, self.prefill(fresh, None), strict=True))
        self._drop_kept(self.kept_prefixes, self.spare_bytes)

    def _find_beginning(self, prompt: Tokens) -> Tensor | None:
        """The state of the longest beginning of a prompt that is kept or in a slot."""
        known = [(ids, state) for ids, state in self.kept.items()]
        known += [(self._fed(slot), self.cache[:, :, slot]) for slot in range(len(self.slots))]
        lengths = [common_length(prompt[:-1], ids) for ids, _ in known]
        best = max(range(len(known)), key=lengths.__getitem__, default=None)
        if best is None or lengths[best] < MIN_PREFIX:
            return None
        return known[best][1][..., : lengths[best], :]

    def _fed(self, slot: int) -> Tokens:
        """The tokens whose keys and values are in a slot."""
        ticket = self.slots[slot]
        return (*ticket.request.prompt_ids, *ticket.written)[: self.positions[slot]]

    def step_inputs(self) -> tuple[Tensor, Tensor, int]:
        """Tokens (n,) and positions (n,) of the active slots, and a span above every position."""
        n, device = len(self.slots), self.cache.device
        span = int(self.positions[:n].max()) + 1
        return torch.from_numpy(self.tokens[:n]).to(device), torch.from_numpy(self.positions[:n]).to(device), span

    def postprocess(self, tokens: list[int], logprobs: list[float | None], stops: Sequence[bool]) -> list[Ticket]:
        """Write one sampled token for each active slot. Returns the tickets that ended; their slots are free."""
        n = len(self.slots)
        reasons = [t.append(token, logprob, stops) for t, token, logprob in zip(self.slots, tokens, logprobs, strict=True)]
        self.tokens[:n] = [t.written[-1] if t.written else 0 for t in self.slots]
        self.positions[:n] += 1
        leaving = [slot for slot, reason in enumerate(reasons) if reason]
        ended = [self.slots[slot] for slot in leaving]
        for slot in leaving[::-1]:  # from the back, so that the slot moved in is still active
            self.slots[slot].finish(reasons[slot])
            self._keep(slot)
            self._compact(slot)
        return ended

    def _keep(self, slot: int) -> None:
        """Keep the state of an ended answer in place of the oldest ones, where it has room beside the held ones."""
        fed = self._fed(slot)
        state = self.cache[:, :, slot, :, : len(fed)]
        if self.kept_prefixes and state.nbytes <= self.spare_bytes - count_bytes(self.held) - count_bytes(self.prefilled):
            self.kept.pop(fed, None)
            self._drop_kept(self.kept_prefixes - 1, self.spare_bytes - state.nbytes)
            self.kept[fed] = state.clone()

    def _drop_kept(self, most: int, most_bytes: int) -> None:
        """Drop the oldest states until so many are kept, and take so many bytes with those of answers to come."""
        beside = count_bytes(self.held) + count_bytes(self.prefilled) if self.kept else 0
        while self.kept and (len(self.kept) > most or count_bytes(self.kept) + beside > most_bytes):
            self.kept.popitem(last=False)

    def _compact(self, slot: int) -> None:
        """Free a slot. Active ones stay the first ones, and the longer ones mostly before the shorter ones.

        From each block behind it the longest sequence moves up by one block, and the last slot into the gap that is left.
        """
        last = len(self.slots) - 1
        for start in range(slot - slot % self.block + self.block, last + 1, self.block):
            longest = start + int(self.positions[start : min(start + self.block, last + 1)].argmax())
            self._move(longest, slot)
            slot = longest
        self._move(last, slot)
        self.slots.pop()

    def _move(self, source: int, target: int) -> None:
        """Move a sequence into a slot in place of the one there."""
        if source == target:
            return
        used, stale = int(self.positions[source]), int(self.positions[target])
        self.cache[:, :, target, :, :used] = self.cache[:, :, source, :, :used]
        self.cache[:, :, target, :, used:stale] = 0
        for state in (self.slots, self.tokens, self.positions):
            state[target] = state[source]


def block_size(slots: int, device: torch.device) -> int:
    """Slots that attend together, over the span of the longest. On a CPU less memory is read so; on a GPU all do, in one recording."""
    return CPU_BLOCK if device.type == "cpu" else slots


def fit_prefill(prompts: Iterable[Tokens]) -> list[Tokens]:
    """The first prompts that one call takes, at least one."""
    taken, longest = [], 0
    for prompt in prompts:
        longest = max(longest, len(prompt))
        if taken and (len(taken) == PREFILL_BATCH or (len(taken) + 1) * longest > PREFILL_PLACES):
            break
        taken.append(prompt)
    return taken


def count_bytes(states: Mapping[Any, Tensor]) -> int:
    return sum(state.nbytes for state in states.values())


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal tokens at the beginning of two sequences."""
    n = min(len(first), len(second))
    different = np.flatnonzero(np.asarray(first[:n]) != np.asarray(second[:n]))
    return int(different[0]) if len(different) else n
