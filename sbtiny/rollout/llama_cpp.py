"""A quantised model decoded by llama.cpp, the program it was quantised for, with our sampling, seeds and control.

Only the logits are llama.cpp's. So a difference to the same model elsewhere is the weights', never another sampler's.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sbtiny.errors import InputError
from sbtiny.models.from_gguf import read_tokenizer
from sbtiny.rollout.engine import token_pieces
from sbtiny.rollout.episode import Episode, Request, StopReason, read_episode
from sbtiny.rollout.guard import Guard
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling, sample, uniforms

PAD = 256  # llama.cpp rounds a sequence's cache up to so many tokens


def available() -> bool:
    return find_spec("llama_cpp") is not None


@dataclass(slots=True)
class Row:
    """One sequence of the cache: `fed` tokens are in it, `coming` go in with the next step."""

    index: int
    request: Request
    guard: Guard | None
    coming: list[int]
    fed: int = 0
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LlamaCpp:
    """The interface of `rollout.engine.Engine` over a GGUF file; `stop_ids` are what llama.cpp itself ends an answer at."""

    def __init__(self, file: Path, slots: int = 64) -> None:
        import llama_cpp

        self.lib, self.slots, self.capacity, self.context = llama_cpp, slots, 0, None
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise InputError(f"llama.cpp cannot load {file}: is it whole, and of a version it knows?")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.positions = llama_cpp.llama_model_n_ctx_train(self.model)
        self.stop_ids = frozenset(i for i in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocab, i))
        self.pieces: Sequence[str] = ()

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        if self.context is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """llama.cpp's own reading of a text, special tokens in it recognised, none added."""
        data = text.encode()
        room = (self.lib.llama_token * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), room, len(room), False, special)
        return list(room[:count])

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each token, (len(ids), vocabulary) float32."""
        self._reserve(len(ids))
        self._clear()
        rows = []
        for start in range(0, len(ids), self.width):
            part = ids[start : start + self.width]
            rows += self._step([(token, start + i, 0, True) for i, token in enumerate(part)])
        return np.stack(rows)

    def run(
        self, requests: Sequence[Request], sampling: Sampling, on_episode: Callable[[int, Episode], None] | None = None
    ) -> list[Episode]:
        """Sample every request; the answer keeps their order. Raises InputError for an empty or too long prompt."""
        self._check(requests)
        self._reserve(max(len(r.prompt_ids) + r.max_tokens for r in requests))
        self._clear()
        episodes: list[Episode | None] = [None] * len(requests)
        queue = deque(sorted(range(len(requests)), key=lambda i: -requests[i].expected))
        rows: dict[int, Row] = {}
        while queue or rows:
            for slot in [s for s in range(self.slots) if s not in rows][: len(queue)]:
                i = queue.popleft()
                guard = None if requests[i].plain else Guard(requests[i], self.pieces)
                rows[slot] = Row(i, requests[i], guard, list(requests[i].prompt_ids))
            for slot, reason, ended in self._advance(rows, sampling):
                row = rows.pop(slot)
                self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), slot, -1, -1)
                episodes[row.index] = self._read(row, reason, ended, sampling.logprobs)
                if on_episode:
                    on_episode(row.index, episodes[row.index])
        return [episode for episode in episodes if episode is not None]

    # ---- one step ------------------------------------------------------------------------------------------------------------------

    def _advance(self, rows: dict[int, Row], sampling: Sampling) -> list[tuple[int, StopReason, bool]]:
        """Feed what is coming, sample one token for every row that has been fed: the slots that ended, and why."""
        entries, asked = [], []
        for slot, row in rows.items():
            now = row.coming[: self.width - len(entries)]
            whole = len(now) == len(row.coming)
            entries += [(t, row.fed + i, slot, whole and i == len(now) - 1) for i, t in enumerate(now)]
            row.fed, row.coming = row.fed + len(now), row.coming[len(now) :]
            asked += [slot] if now and whole else []
            if len(entries) == self.width:
                break
        logits = self._step(entries)
        if not asked:
            return []
        seeds = np.array([rows[s].request.seed % 2**64 for s in asked], dtype=np.uint64)
        counts = np.array([len(rows[s].written) for s in asked], dtype=np.uint64)
        tokens, logprobs = sample(torch.from_numpy(np.stack(logits)), sampling, uniforms(seeds, counts))
        said = [0.0] * len(asked) if logprobs is None else logprobs.tolist()
        taken = [(s, self._take(rows[s], t, p)) for s, t, p in zip(asked, tokens.tolist(), said, strict=True)]
        return [(slot, *end) for slot, end in taken if end]

    def _take(self, row: Row, token: int, logprob: float) -> tuple[StopReason, bool] | None:
        """Write one sampled token, or what control puts in its place; the reason when the answer is over."""
        if row.guard:
            answer = row.guard.take(token, token in self.stop_ids)
            if isinstance(answer, str):
                return answer, False
            token, logprob = answer, 0.0 if row.guard.injected[-1] else logprob
        row.written.append(token)
        row.logprobs.append(logprob)
        row.coming = [token]
        if token in self.stop_ids:
            return "end", True
        return ("length", False) if len(row.written) >= row.request.max_tokens else None

    def _read(self, row: Row, reason: StopReason, ended: bool, with_logprobs: bool) -> Episode:
        if row.guard and row.guard.control.wrapped and reason != "interrupted":
            reason = "ceiling"
        injected = row.guard.injected[: len(row.written)] if row.guard else None
        logprobs = row.logprobs if with_logprobs else None
        episode = read_episode(row.request, row.written, self.pieces, reason, logprobs, injected, ended)
        episode.heeded = row.guard.control.budget if row.guard else None
        return episode

    def _step(self, entries: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """Compute (token, position, sequence, whether its logits are wanted); the logits wanted, in order."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with {code} for {len(entries)} tokens")
        found = []
        for i in (i for i, entry in enumerate(entries) if entry[3]):
            found.append(np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.size,)).copy())
        return found

    # ---- the context ---------------------------------------------------------------------------------------------------------------

    def _reserve(self, capacity: int) -> None:
        """A context of `slots` sequences with room for `capacity` tokens each."""
        if capacity <= self.capacity:
            return
        if self.context is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
        self.capacity, self.width = -(-capacity // PAD) * PAD, max(self.slots, 256)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = self.capacity * self.slots, self.slots, False
        params.n_batch = params.n_ubatch = self.width
        params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise InputError(f"llama.cpp has no memory for {self.slots} answers of {capacity} tokens: lower eval.slots")
        self.batch = self.lib.llama_batch_init(self.width, 0, 1)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.prompt_ids:
                raise InputError("an empty prompt: the chat template rendered nothing")
            if (total := len(request.prompt_ids) + request.max_tokens) > self.positions:
                raise InputError(f"{total} tokens exceed the model's {self.positions} positions: lower --max-tokens")


class GgufPolicy(Policy):
    """A GGUF file ready to be asked, tokenizer and chat template its own. Raises InputError when it cannot be read rightly."""

    def __init__(self, file: Path, slots: int = 64) -> None:
        from gguf import GGUFReader

        try:
            self.tokenizer = read_tokenizer(GGUFReader(file), file)
        except (ValueError, IndexError, OSError) as error:
            raise InputError(f"{file} is not a readable GGUF file: {error}") from error
        self.engine = LlamaCpp(file, slots)
        self.engine.pieces = token_pieces(self.tokenizer, self.engine.size)

    def refresh(self) -> None:
        """Nothing: its weights do not change."""
