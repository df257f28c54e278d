"""The state of one run of the decode loop: what a step reads, and what becomes of the tokens it sampled."""

from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sbtiny.rollout.decoder import OnEpisode
from sbtiny.rollout.episode import Episode, Request, StopReason
from sbtiny.rollout.limit_enforcer import Guard, finished

if TYPE_CHECKING:
    from sbtiny.rollout.engine import Engine

STAGED = 32  # prompts computed together, ahead of the slots they will take


class Batch:
    """Which request sits in which slot, what it has written, who waits. Active slots are always the first ones."""

    def __init__(
        self, engine: "Engine", requests: Sequence[Request], on_episode: OnEpisode | None = None
    ) -> None:
        self.engine, self.requests, self.active, self.on_episode = engine, requests, 0, on_episode
        self.guards: dict[int, Guard] = {}  # by request, and only for those that are not plain
        order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)  # long ones first: a short tail
        self.queue, self.staged = deque(order), {}
        self.waiting = Counter(r.prompt_ids for r in requests)
        self.episodes: list[Episode | None] = [None] * len(requests)
        slots, longest = engine.rows, max(r.max_tokens for r in requests)
        self.index, self.tokens, self.positions, self.counts, self.limits = (
            np.zeros(slots, dtype=np.int64) for _ in range(5)
        )
        self.seeds = np.zeros(slots, dtype=np.uint64)
        self.written = np.zeros((slots, longest), dtype=np.int64)
        self.logprobs = np.zeros((slots, longest), dtype=np.float32)

    def refill(self) -> bool:
        """Fill free slots from the queue; False when nothing is left to decode."""
        while self.queue and self.active < self.engine.rows:
            index = self.queue.popleft()
            request = self.requests[index]
            if request.interrupt is not None and request.interrupt.is_set():
                self._forget(request.prompt_ids)
                self._deliver(index, finished(request, [], self.engine.pieces, "interrupted"))
            else:
                self._admit(index)
        return self.active > 0

    def _forget(self, prompt: tuple[int, ...]) -> None:
        """One request less waits for this prompt; after the last its keys and values go."""
        self.waiting[prompt] -= 1
        if not self.waiting[prompt]:
            self.staged.pop(prompt, None)
            del self.waiting[prompt]

    def _admit(self, index: int) -> None:
        request, slot = self.requests[index], self.active
        prompt = request.prompt_ids
        if prompt not in self.staged:
            self._stage(prompt)
        state, last = self.staged[prompt], len(prompt) - 1
        cache = self.engine.cache[:, :, slot]
        cache[..., last:, :] = 0  # what the last tenant left is read masked, and 0 x NaN would still be NaN
        cache[..., :last, :] = state
        self._forget(prompt)
        if not request.plain:
            self.guards[index] = Guard(request, self.engine.pieces)
        self.index[slot], self.tokens[slot], self.positions[slot] = index, prompt[-1], last
        self.counts[slot], self.limits[slot], self.seeds[slot] = 0, request.max_tokens, request.seed % 2**64
        self.active += 1

    def _stage(self, prompt: tuple[int, ...]) -> None:
        """Compute this prompt together with the next ones of the queue: one call for many small products."""
        coming = [self.requests[i].prompt_ids for i in list(self.queue)[: 4 * STAGED]]
        fresh = list(dict.fromkeys([prompt, *(p for p in coming if p not in self.staged)]))[:STAGED]
        self.staged.update(zip(fresh, self.engine._prefill(fresh), strict=True))

    def inputs(self) -> tuple[Tensor, Tensor, int]:
        n, device = self.active, self.engine.cache.device
        span = int(self.positions[:n].max()) + 1
        return torch.from_numpy(self.tokens[:n]).to(device), torch.from_numpy(self.positions[:n]).to(device), span

    def accept(self, tokens: np.ndarray, logprobs: np.ndarray | None) -> None:
        """Take one sampled token per active slot; the episodes that ended with it leave their slots."""
        n, rows = self.active, np.arange(self.active)
        cut = self._consult(tokens) if self.guards else {}
        self.written[rows, self.counts[:n]] = tokens
        if logprobs is not None:
            self.logprobs[rows, self.counts[:n]] = logprobs
        self.counts[:n] += 1
        self.positions[:n] += 1
        self.tokens[:n] = tokens
        stopped = self.engine.stops[tokens]
        ended = stopped | (self.counts[:n] >= self.limits[:n])
        for slot in cut:
            stopped[slot], ended[slot] = False, True
            self.counts[slot] -= 1  # its token does not stand
        leaving = np.flatnonzero(ended)
        done = [
            (int(self.index[slot]), self._read(int(slot), bool(stopped[slot]), cut.get(int(slot)), logprobs is not None))
            for slot in leaving
        ]
        for slot in leaving[::-1]:  # from the back, so that the slot moved in is never one that ended
            self._vacate(int(slot))
        for index, episode in done:
            self._deliver(index, episode)

    def _consult(self, tokens: np.ndarray) -> dict[int, StopReason]:
        """Let control replace tokens, in place; the slots whose answer ends without its token, and why."""
        cut: dict[int, StopReason] = {}
        for slot in range(self.active):
            if (guard := self.guards.get(int(self.index[slot]))) is not None:
                token = int(tokens[slot])
                answer = guard.take(token, bool(self.engine.stops[token]))
                if isinstance(answer, str):
                    cut[slot] = answer
                else:
                    tokens[slot] = answer
        return cut

    def _read(self, slot: int, stopped: bool, cut: StopReason | None, with_logprobs: bool) -> Episode:
        count, request = int(self.counts[slot]), self.requests[self.index[slot]]
        ids = self.written[slot, :count].tolist()
        logprobs = self.logprobs[slot, :count].tolist() if with_logprobs else None
        guard = self.guards.pop(int(self.index[slot]), None)
        return finished(request, ids, self.engine.pieces, cut or ("end" if stopped else "length"), logprobs, guard)

    def _deliver(self, index: int, episode: Episode) -> None:
        self.episodes[index] = episode
        if self.on_episode:
            self.on_episode(index, episode)

    def _vacate(self, slot: int) -> None:
        """Move the last active slot into this one, so that a step's rows stay contiguous."""
        last = self.active = self.active - 1
        if slot != last:
            used = int(self.positions[last])
            cache = self.engine.cache
            cache[:, :, slot, :, used:] = 0
            cache[:, :, slot, :, :used] = cache[:, :, last, :, :used]
            for state in (self.index, self.tokens, self.positions, self.counts, self.limits, self.seeds):
                state[slot] = state[last]
            self.written[slot], self.logprobs[slot] = self.written[last], self.logprobs[last]
