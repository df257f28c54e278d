"""The state of one run of the decode loop: which request is in which slot, the inputs of a step, the tokens it sampled."""

from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sbtiny.models.shapes import PREFILL_BATCH
from sbtiny.rollout.decoder import OnEpisode
from sbtiny.rollout.episode import Episode, Request, StopReason, to_episode
from sbtiny.rollout.limits import LimitEnforcer

Prefill = Callable[[list[tuple[int, ...]]], list[Tensor]]  # prompts -> keys and values of each, without its last token


class Scheduler:
    """Assigns requests to slots, and keeps their tokens and the queue. Active slots are always the first ones.

    `cache` is (layers, 2, slots, kv heads, capacity, head_dim); `prefill` computes a prompt's keys and values for its slot.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        cache: Tensor,
        prefill: Prefill,
        pieces: Sequence[str],
        stops: np.ndarray,
        on_episode: OnEpisode | None = None,
    ) -> None:
        self.requests, self.cache, self.prefill, self.pieces, self.stops = requests, cache, prefill, pieces, stops
        self.rows, self.active, self.on_episode = cache.shape[2], 0, on_episode
        self.enforcers: dict[int, LimitEnforcer] = {}  # by request index; unlimited requests have none
        order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)  # long ones first, so that the end of the run is short
        self.queue, self.prefilled = deque(order), {}
        self.waiting = Counter(r.prompt_ids for r in requests)
        self.episodes: list[Episode | None] = [None] * len(requests)
        slots, longest = self.rows, max(r.max_tokens for r in requests)
        self.index, self.tokens, self.positions, self.counts, self.limits = (np.zeros(slots, dtype=np.int64) for _ in range(5))
        self.seeds = np.zeros(slots, dtype=np.uint64)
        self.written = np.zeros((slots, longest), dtype=np.int64)
        self.logprobs = np.zeros((slots, longest), dtype=np.float32)

    def refill(self) -> bool:
        """Fill free slots from the queue. False when nothing is left to decode."""
        while self.queue and self.active < self.rows:
            index = self.queue.popleft()
            request = self.requests[index]
            if request.interrupt is not None and request.interrupt.is_set():
                self._forget(request.prompt_ids)
                self._deliver(index, to_episode(request, [], self.pieces, "interrupted"))
            else:
                self._admit(index)
        return self.active > 0

    def _forget(self, prompt: tuple[int, ...]) -> None:
        """Count one request less that waits for this prompt; after the last, drop its keys and values."""
        self.waiting[prompt] -= 1
        if not self.waiting[prompt]:
            self.prefilled.pop(prompt, None)
            del self.waiting[prompt]

    def _admit(self, index: int) -> None:
        request, slot = self.requests[index], self.active
        prompt = request.prompt_ids
        if prompt not in self.prefilled:
            self._prefill_ahead(prompt)
        state, last = self.prefilled[prompt], len(prompt) - 1
        cache = self.cache[:, :, slot]
        cache[..., last:, :] = 0  # masked positions are read too, and 0 x NaN of an earlier request would be NaN
        cache[..., :last, :] = state
        self._forget(prompt)
        if enforcer := request.enforcer(self.pieces):
            self.enforcers[index] = enforcer
        self.index[slot], self.tokens[slot], self.positions[slot] = index, prompt[-1], last
        self.counts[slot], self.limits[slot], self.seeds[slot] = 0, request.max_tokens, request.seed % 2**64
        self.active += 1

    def _prefill_ahead(self, prompt: tuple[int, ...]) -> None:
        """Compute this prompt and the next ones of the queue in one call, which is faster than many small ones."""
        coming = [self.requests[i].prompt_ids for i in list(self.queue)[: 4 * PREFILL_BATCH]]
        fresh = list(dict.fromkeys([prompt, *(p for p in coming if p not in self.prefilled)]))[:PREFILL_BATCH]
        self.prefilled.update(zip(fresh, self.prefill(fresh), strict=True))

    def step_inputs(self) -> tuple[Tensor, Tensor, int]:
        """Tokens (n,) and positions (n,) of the active slots, and a span above every position."""
        n, device = self.active, self.cache.device
        span = int(self.positions[:n].max()) + 1
        return torch.from_numpy(self.tokens[:n]).to(device), torch.from_numpy(self.positions[:n]).to(device), span

    def postprocess(self, tokens: np.ndarray, logprobs: np.ndarray | None) -> None:
        """Write one sampled token for each active slot. Finished episodes are delivered, and their slots freed."""
        n, rows = self.active, np.arange(self.active)
        cut = self._apply_limits(tokens) if self.enforcers else {}
        self.written[rows, self.counts[:n]] = tokens
        if logprobs is not None:
            self.logprobs[rows, self.counts[:n]] = logprobs
        self.counts[:n] += 1
        self.positions[:n] += 1
        self.tokens[:n] = tokens
        stopped = self.stops[tokens]
        ended = stopped | (self.counts[:n] >= self.limits[:n])
        for slot in cut:
            stopped[slot], ended[slot] = False, True
            self.counts[slot] -= 1  # the token is not part of the answer
        leaving = np.flatnonzero(ended)
        done = [
            (int(self.index[slot]), self._read(int(slot), bool(stopped[slot]), cut.get(int(slot)), logprobs is not None))
            for slot in leaving
        ]
        for slot in leaving[::-1]:  # from the back, so that the slot moved in is still active
            self._compact(int(slot))
        for index, episode in done:
            self._deliver(index, episode)

    def _apply_limits(self, tokens: np.ndarray) -> dict[int, StopReason]:
        """Let the enforcers replace tokens in place. Returns the slots that end without their token, with the reason."""
        cut: dict[int, StopReason] = {}
        for slot in range(self.active):
            if (enforcer := self.enforcers.get(int(self.index[slot]))) is not None:
                token = int(tokens[slot])
                outcome = enforcer.check_token(token, bool(self.stops[token]))
                if isinstance(outcome, str):
                    cut[slot] = outcome
                else:
                    tokens[slot] = outcome
        return cut

    def _read(self, slot: int, stopped: bool, cut: StopReason | None, with_logprobs: bool) -> Episode:
        count, request = int(self.counts[slot]), self.requests[self.index[slot]]
        ids = self.written[slot, :count].tolist()
        logprobs = self.logprobs[slot, :count].tolist() if with_logprobs else None
        enforcer = self.enforcers.pop(int(self.index[slot]), None)
        return to_episode(request, ids, self.pieces, cut or ("end" if stopped else "length"), logprobs, enforcer)

    def _deliver(self, index: int, episode: Episode) -> None:
        self.episodes[index] = episode
        if self.on_episode:
            self.on_episode(index, episode)

    def _compact(self, slot: int) -> None:
        """Move the last active slot into this one: active slots stay the first ones."""
        last = self.active = self.active - 1
        if slot != last:
            used = int(self.positions[last])
            cache = self.cache
            cache[:, :, slot, :, used:] = 0
            cache[:, :, slot, :, :used] = cache[:, :, last, :, :used]
            for state in (self.index, self.tokens, self.positions, self.counts, self.limits, self.seeds):
                state[slot] = state[last]
            self.written[slot], self.logprobs[slot] = self.written[last], self.logprobs[last]
