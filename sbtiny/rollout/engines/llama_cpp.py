"""A quantised model decoded by llama.cpp, the program it was quantised for, with our sampling, seeds and control.

Only the logits are llama.cpp's. So a difference to the same model elsewhere is the weights', never another sampler's.
"""

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sbtiny.budget.protocol import SOLUTION
from sbtiny.models.chat_template import form_of_template
from sbtiny.errors import InputError
from sbtiny.models.gguf import read_tokenizer
from sbtiny.models.prompt import fit_template
from sbtiny.models.shapes import slot_bytes
from sbtiny.rollout.engines.sequence import Answer, draws
from sbtiny.rollout.decoder import OnEpisode, check
from sbtiny.rollout.engine import token_pieces
from sbtiny.rollout.episode import Episode, Request, StopReason
from sbtiny.rollout.memory import slots_within
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling, sample

PAD = 256  # llama.cpp rounds a sequence's cache up to so many tokens


def available() -> bool:
    return find_spec("llama_cpp") is not None


class Row(Answer):
    """One sequence of the cache: `fed` tokens are in it, `coming` go in with the next step."""

    def __init__(self, index: int, request: Request, pieces: Sequence[str]) -> None:
        super().__init__(index, request, pieces)
        self.coming, self.fed = list(request.prompt_ids), 0


class LlamaCpp:
    """A decoder over a GGUF file; `stops` are what llama.cpp itself ends an answer at."""

    def __init__(self, file: Path, slots: int = 64, kv_memory: float | None = None) -> None:
        import llama_cpp

        self.lib, self.slots, self.kv_memory, self.capacity, self.context = llama_cpp, slots, kv_memory, 0, None
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

    def refresh(self) -> None:
        """Nothing: a file's weights do not change."""

    def check_room(self, tokens: int) -> None:
        slots_within(self._slot_bytes(tokens), 1, self.kv_memory, torch.device("cpu"))

    def run(
        self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None
    ) -> list[Episode]:
        """Sample every request; see `Decoder`."""
        check(requests, self.positions, self.stops)
        self._reserve(max(len(r.prompt_ids) + r.max_tokens for r in requests))
        self._clear()
        episodes: list[Episode | None] = [None] * len(requests)
        queue = deque(sorted(range(len(requests)), key=lambda i: -requests[i].expected))
        rows: dict[int, Row] = {}
        while queue or rows:
            for slot in [s for s in range(self.rows) if s not in rows][: len(queue)]:
                i = queue.popleft()
                rows[slot] = Row(i, requests[i], self.pieces)
            for slot, reason in self._advance(rows, sampling):
                row = rows.pop(slot)
                self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), slot, -1, -1)
                episodes[row.index] = row.episode(reason, sampling.logprobs)
                if on_episode:
                    on_episode(row.index, episodes[row.index])
        return [episode for episode in episodes if episode is not None]

    # ---- one step ------------------------------------------------------------------------------------------------------------------

    def _advance(self, rows: dict[int, Row], sampling: Sampling) -> list[tuple[int, StopReason]]:
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
        tokens, logprobs = sample(torch.from_numpy(np.stack(logits)), sampling, draws([rows[s] for s in asked]))
        said = [0.0] * len(asked) if logprobs is None else logprobs.tolist()
        ended = []
        for slot, token, logprob in zip(asked, tokens.tolist(), said, strict=True):
            if reason := rows[slot].take(token, logprob, self.stops):
                ended.append((slot, reason))
            rows[slot].coming = rows[slot].written[-1:]
        return ended

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
        """A context of at most `slots` sequences with room for `capacity` tokens each."""
        if capacity <= self.capacity:
            return
        if self.context is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
            self.context = None
        self.capacity = -(-capacity // PAD) * PAD
        self.rows = slots_within(self._slot_bytes(self.capacity), self.slots, self.kv_memory, torch.device("cpu"))
        self.width = max(self.rows, 256)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = self.capacity * self.rows, self.rows, False
        params.n_batch = params.n_ubatch = self.width
        params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise InputError(f"llama.cpp has no memory for {self.rows} answers of {capacity} tokens: lower eval.slots")
        self.batch = self.lib.llama_batch_init(self.width, 0, 1)

    def _slot_bytes(self, capacity: int) -> int:
        """A sequence's keys and values in 16 bits."""
        lib, model = self.lib, self.model
        text = (ctypes.c_char * 64)()
        lib.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
        known = lib.llama_model_meta_val_str(model, text.value + b".attention.key_length", text, len(text)) > 0
        head_dim = int(text.value) if known else lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)
        return slot_bytes(lib.llama_model_n_layer(model), lib.llama_model_n_head_kv(model) * head_dim, capacity, 2)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


class GgufPolicy(Policy):
    """A GGUF file ready to be asked, tokenizer and chat template its own. Raises InputError when it cannot be read rightly."""

    def __init__(self, file: Path, slots: int = 64, kv_memory: float | None = None) -> None:
        from gguf import GGUFReader

        try:
            self.tokenizer = read_tokenizer(GGUFReader(file), file)
        except (ValueError, IndexError, OSError) as error:
            raise InputError(f"{file} is not a readable GGUF file: {error}") from error
        self.form = form_of_template(self.tokenizer.chat_template) or SOLUTION
        fit_template(self.tokenizer, self.form)
        self.engine = LlamaCpp(file, slots, kv_memory)
        self.engine.pieces = token_pieces(self.tokenizer, self.engine.size)
