"""A GGUF file decoded by llama.cpp, with our sampling, seeds and limits.

Only the logits are llama.cpp's. So a difference to the same model in another engine comes from the weights, never from the sampler.
"""

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sbtiny.errors import InputError
from sbtiny.models.shapes import slot_bytes
from sbtiny.rollout.decoder import OnEpisode, validate_requests
from sbtiny.rollout.engines.sequence import RunningSequence, uniform_for
from sbtiny.rollout.episode import Episode, Request, StopReason
from sbtiny.rollout.memory import fit_slots
from sbtiny.rollout.sampling import Sampling, sample_tokens

CACHE_ROUNDING = 256  # llama.cpp rounds a sequence's cache up to a multiple of this many tokens


def is_available() -> bool:
    return find_spec("llama_cpp") is not None


class SequenceState(RunningSequence):
    """One sequence of the cache: `fed` tokens are in it, the ids in `coming` go in with the next steps."""

    def __init__(self, index: int, request: Request, pieces: Sequence[str]) -> None:
        super().__init__(index, request, pieces)
        self.coming, self.fed = list(request.prompt_ids), 0


class LlamaCppEngine:
    """A decode engine for a GGUF file; `stops` are llama.cpp's own end-of-generation tokens."""

    def __init__(self, file: Path, slots: int = 64, kv_cache_gib: float | None = None) -> None:
        import llama_cpp

        self.lib, self.slots, self.kv_cache_gib, self.capacity, self.context = llama_cpp, slots, kv_cache_gib, 0, None
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise InputError(f"llama.cpp cannot load {file}: is it whole, and of a version it knows?")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.positions = llama_cpp.llama_model_n_ctx_train(self.model)
        self.stops = np.array([llama_cpp.llama_vocab_is_eog(self.vocab, i) for i in range(self.size)], dtype=bool)
        self.pieces: Sequence[str] = ()

    def close(self) -> None:
        """Free the memory; the engine cannot be used afterwards."""
        if self.context is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Tokenise a text as llama.cpp does: special tokens in it are recognised (`special`), none is added."""
        data = text.encode()
        buffer = (self.lib.llama_token * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), False, special)
        return list(buffer[:count])

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each token, (len(ids), vocabulary) float32."""
        self._reserve(len(ids))
        self._clear()
        rows = []
        for start in range(0, len(ids), self.width):
            part = ids[start : start + self.width]
            rows += self._step([(token, start + i, 0, True) for i, token in enumerate(part)])
        return np.stack(rows)

    def refresh(self) -> None:
        """Do nothing: a file's weights do not change."""

    def check_room(self, tokens: int) -> None:
        fit_slots(self._slot_bytes(tokens), 1, self.kv_cache_gib, torch.device("cpu"))

    def run(self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None) -> list[Episode]:
        """Sample every request; see `DecodeEngine`."""
        validate_requests(requests, self.positions, self.stops)
        self._reserve(max(len(r.prompt_ids) + r.max_tokens for r in requests))
        self._clear()
        episodes: list[Episode | None] = [None] * len(requests)
        queue = deque(sorted(range(len(requests)), key=lambda i: -requests[i].expected))
        rows: dict[int, SequenceState] = {}
        while queue or rows:
            for slot in [s for s in range(self.rows) if s not in rows][: len(queue)]:
                i = queue.popleft()
                rows[slot] = SequenceState(i, requests[i], self.pieces)
            for slot, reason in self._advance(rows, sampling):
                row = rows.pop(slot)
                self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), slot, -1, -1)
                episodes[row.index] = row.episode(reason, sampling.logprobs)
                if on_episode:
                    on_episode(row.index, episodes[row.index])
        return [episode for episode in episodes if episode is not None]

    # ---- one step ------------------------------------------------------------------------------------------------------------------

    def _advance(self, rows: dict[int, SequenceState], sampling: Sampling) -> list[tuple[int, StopReason]]:
        """Feed the coming tokens, then sample one token for each row fed to its end. Returns the slots that ended, with the reason."""
        entries, complete = [], []
        for slot, row in rows.items():
            part = row.coming[: self.width - len(entries)]
            whole = len(part) == len(row.coming)
            entries += [(t, row.fed + i, slot, whole and i == len(part) - 1) for i, t in enumerate(part)]
            row.fed, row.coming = row.fed + len(part), row.coming[len(part) :]
            complete += [slot] if part and whole else []
            if len(entries) == self.width:
                break
        logits = self._step(entries)
        if not complete:
            return []
        tokens, logprobs = sample_tokens(torch.from_numpy(np.stack(logits)), sampling, uniform_for([rows[s] for s in complete]))
        values = [0.0] * len(complete) if logprobs is None else logprobs.tolist()
        ended = []
        for slot, token, logprob in zip(complete, tokens.tolist(), values, strict=True):
            if reason := rows[slot].append(token, logprob, self.stops):
                ended.append((slot, reason))
            rows[slot].coming = rows[slot].written[-1:]
        return ended

    def _step(self, entries: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """Run one batch of (token, position, sequence, wanted). Returns the logits (vocabulary,) of the wanted entries, in order."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with {code} for {len(entries)} tokens")
        wanted_at = (i for i, entry in enumerate(entries) if entry[3])
        return [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.size,)).copy() for i in wanted_at]

    # ---- the context ---------------------------------------------------------------------------------------------------------------

    def _reserve(self, capacity: int) -> None:
        """Make a context of at most `slots` sequences of `capacity` tokens each."""
        if capacity <= self.capacity:
            return
        if self.context is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
            self.context = None
        self.capacity = -(-capacity // CACHE_ROUNDING) * CACHE_ROUNDING
        self.rows = fit_slots(self._slot_bytes(self.capacity), self.slots, self.kv_cache_gib, torch.device("cpu"))
        self.width = max(self.rows, 256)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = self.capacity * self.rows, self.rows, False
        params.n_batch = params.n_ubatch = self.width
        params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise InputError(f"llama.cpp has no memory for {self.rows} answers of {capacity} tokens: lower eval.max_num_seqs")
        self.batch = self.lib.llama_batch_init(self.width, 0, 1)

    def _slot_bytes(self, capacity: int) -> int:
        """Bytes of a sequence's keys and values, in 16 bits."""
        lib, model = self.lib, self.model
        text = (ctypes.c_char * 64)()
        lib.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
        known = lib.llama_model_meta_val_str(model, text.value + b".attention.key_length", text, len(text)) > 0
        head_dim = int(text.value) if known else lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)
        return slot_bytes(lib.llama_model_n_layer(model), lib.llama_model_n_head_kv(model) * head_dim, capacity, 2)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
