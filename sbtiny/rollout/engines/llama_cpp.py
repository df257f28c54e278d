"""A GGUF file decoded by llama.cpp, with our sampling, seeds and limits.

Only the logits are llama.cpp's. So a difference to the same model in another engine comes from the weights, never from the sampler.
"""

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbtiny.errors import InputError
from sbtiny.models import shapes
from sbtiny.rollout.decode_engine import DecodeEngine
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.memory import fit_slots
from sbtiny.rollout.sampling import TagMask, sample_rows
from sbtiny.rollout.scheduler import common_length
from sbtiny.rollout.session import Session, Ticket, check_capacity, uniform_draws

CACHE_ROUNDING = 256  # llama.cpp rounds a sequence's cache up to a multiple of this many tokens


def is_available() -> bool:
    return find_spec("llama_cpp") is not None


def count_threads() -> int:
    """Threads for llama.cpp: as OMP_NUM_THREADS says, else all usable cores; llama-cpp-python's own default is half of them."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # it may list one number for each level of nesting
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (int(outermost) if outermost.isdecimal() else 0) or usable


@cache
def silent_callback() -> Any:
    """A log callback that says nothing. C holds no reference to it and calls it for all models: it is kept for ever."""
    from llama_cpp import llama_log_callback

    return llama_log_callback(lambda level, text, data: None)


class LlamaCppEngine(DecodeEngine):
    """A decode engine for a GGUF file; `stops` are llama.cpp's own end-of-generation tokens."""

    def __init__(self, file: Path, slots: int = 64, kv_cache_gib: float | None = None) -> None:
        import llama_cpp

        self.lib, self.slots, self.kv_cache_gib, self.capacity, self.context = llama_cpp, slots, kv_cache_gib, 0, None
        llama_cpp.llama_log_set(silent_callback(), None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise InputError(f"llama.cpp cannot load {file}: is it whole, and of a version it knows?")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.max_positions = llama_cpp.llama_model_n_ctx_train(self.model)
        self.stops = np.array([llama_cpp.llama_vocab_is_eog(self.vocab, i) for i in range(self.size)], dtype=bool)
        self.pieces: Sequence[str] = ()
        self.sessions = 0

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
            rows += self.feed([(token, start + i, 0, True) for i, token in enumerate(part)])
        return np.stack(rows)

    def refresh(self) -> None:
        """Do nothing: a file's weights do not change."""

    def check_room(self, tokens: int) -> None:
        fit_slots(self.slot_bytes(tokens), 1, self.kv_cache_gib, torch.device("cpu"))

    def open_session(self, capacity: int, kept_prefixes: int = 0) -> "LlamaCppSession":
        self._reserve(capacity, keeps_states=kept_prefixes > 0)
        self._clear()
        self.tag_mask = TagMask(self.pieces)
        self.sessions += 1
        return LlamaCppSession(self, keep=kept_prefixes > 0)

    def copy_state(self, slot: int) -> bytes:
        """A sequence's keys and values, as llama.cpp writes them."""
        buffer = (ctypes.c_uint8 * self.lib.llama_state_seq_get_size(self.context, slot))()
        return bytes(buffer[: self.lib.llama_state_seq_get_data(self.context, buffer, len(buffer), slot)])

    def restore_state(self, slot: int, state: bytes) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self.lib.llama_state_seq_set_data(self.context, buffer, len(state), slot):
            raise RuntimeError(f"llama.cpp does not take {len(state)} bytes of state back")

    def forget(self, slot: int, start: int = 0) -> None:
        """Drop a sequence's keys and values from token `start` on."""
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), slot, start, -1)

    def feed(self, entries: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
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

    def _reserve(self, capacity: int, keeps_states: bool = False) -> None:
        """Make a context of at most `slots` sequences of `capacity` tokens each."""
        if capacity <= self.capacity and self.context is not None:  # a larger one may have been refused
            return
        if self.context is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
            self.context = None
        self.capacity = -(-capacity // CACHE_ROUNDING) * CACHE_ROUNDING
        slot = self.slot_bytes(self.capacity)
        self.rows, self.spare_bytes = fit_slots(slot, self.slots, self.kv_cache_gib, torch.device("cpu"), keeps_states)
        self.width = max(self.rows, 256)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = self.capacity * self.rows, self.rows, False
        params.n_batch = params.n_ubatch = self.width
        params.n_threads = params.n_threads_batch = count_threads()
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise InputError(f"llama.cpp has no memory for {self.rows} answers of {capacity} tokens: lower eval.max_num_seqs")
        self.batch = self.lib.llama_batch_init(self.width, 0, 1)

    def slot_bytes(self, capacity: int) -> int:
        """Bytes of a sequence's keys and values, in 16 bits."""
        lib, model = self.lib, self.model
        text = (ctypes.c_char * 64)()
        lib.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
        known = lib.llama_model_meta_val_str(model, text.value + b".attention.key_length", text, len(text)) > 0
        head_dim = int(text.value) if known else lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)
        return shapes.slot_bytes(lib.llama_model_n_layer(model), lib.llama_model_n_head_kv(model) * head_dim, capacity, 2)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


class LlamaCppSession(Session):
    """The decode loop over llama.cpp's sequences. With `keep`, a free slot keeps its sequence for a prompt that goes on from it."""

    def __init__(self, engine: LlamaCppEngine, keep: bool) -> None:
        self.engine, self.number, self.keep, self.spare_bytes = engine, engine.sessions, keep, engine.spare_bytes
        self.queue: deque[Ticket] = deque()
        self.running: dict[int, Ticket] = {}  # by slot
        self.fed: list[list[int]] = [[] for _ in range(engine.rows)]  # tokens in the cache
        self.coming: dict[int, list[int]] = {}  # tokens that go in with the next steps
        self.held: dict[Ticket, tuple[bytes, list[int], list[int]]] = {}  # state, tokens in it, tokens that come

    def add(self, request: Request, sampling: Sampling) -> Ticket:
        ticket = self.engine.make_ticket(request, sampling)
        check_capacity(request, self.engine.capacity)
        self.queue.append(ticket)
        return ticket

    def drop(self, ticket: Ticket) -> None:
        if ticket in self.queue:
            self.queue.remove(ticket)
        self.held.pop(ticket, None)
        for slot in [s for s, running in self.running.items() if running is ticket]:
            self._free(slot)

    def hold(self, ticket: Ticket) -> int:
        slot = next(s for s, running in self.running.items() if running is ticket)
        state = self.engine.copy_state(slot)
        self.held[ticket] = state, list(self.fed[slot]), self.coming[slot]
        self._free(slot)
        return len(state)

    def resume(self, ticket: Ticket) -> None:
        if ticket not in self.held:
            raise ValueError("this answer is not held")
        self.queue.appendleft(ticket)

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.queue)

    def step(self) -> list[Ticket]:
        if self.engine.sessions != self.number:
            raise RuntimeError("another session was opened on this engine: it has one cache")
        ended = self._refill()
        slots = self._feed()
        if not slots:
            return ended
        logits = torch.from_numpy(np.stack([row for _, row in slots]))
        tickets = [self.running[slot] for slot, _ in slots]
        self.engine.tag_mask.apply(logits, [t.enforcer for t in tickets])
        tokens, logprobs = sample_rows(logits, [t.sampling for t in tickets], uniform_draws(tickets))
        for (slot, _), ticket, token, logprob in zip(slots, tickets, tokens, logprobs, strict=True):
            if reason := ticket.append(token, logprob, self.engine.stops):
                ticket.finish(reason)
                ended.append(ticket)
                self._free(slot)
            else:
                self.coming[slot] = ticket.written[-1:]
        return ended

    def _refill(self) -> list[Ticket]:
        """Fill free slots from the queue. Returns the tickets that the user stopped before they began."""
        stopped = []
        while self.queue and len(self.running) < self.engine.rows:
            ticket = self.queue.popleft()
            if ticket in self.held:
                self._go_on(ticket)
            elif ticket.is_stopped:
                ticket.finish("interrupted")
                stopped.append(ticket)
            else:
                self._admit(ticket)
        return stopped

    def _admit(self, ticket: Ticket) -> None:
        """Give a ticket the free slot with the longest common beginning; the last token of a prompt is always computed."""
        prompt = ticket.request.prompt_ids
        free = [slot for slot in range(self.engine.rows) if slot not in self.running]
        common = {slot: common_length(prompt[:-1], self.fed[slot]) for slot in free}
        slot = max(free, key=common.__getitem__)
        self.engine.forget(slot, common[slot])
        self.fed[slot] = self.fed[slot][: common[slot]]
        self.running[slot], self.coming[slot] = ticket, list(prompt[common[slot] :])

    def _go_on(self, ticket: Ticket) -> None:
        """Put a held ticket into a free slot."""
        slot = next(slot for slot in range(self.engine.rows) if slot not in self.running)
        state, self.fed[slot], self.coming[slot] = self.held.pop(ticket)
        self.engine.forget(slot)
        self.engine.restore_state(slot, state)
        self.running[slot] = ticket

    def _free(self, slot: int) -> None:
        del self.running[slot], self.coming[slot]
        if not self.keep:
            self.engine.forget(slot)
            self.fed[slot] = []

    def _feed(self) -> list[tuple[int, np.ndarray]]:
        """Feed the coming tokens, as many as fit a batch. Returns the slots that were fed to their end, with their logits."""
        entries, whole = [], []
        for slot, coming in self.coming.items():
            part = coming[: self.engine.width - len(entries)]
            is_whole = 0 < len(part) == len(coming)
            start = len(self.fed[slot])
            entries += [(token, start + i, slot, is_whole and i == len(part) - 1) for i, token in enumerate(part)]
            self.fed[slot] += part
            self.coming[slot] = coming[len(part) :]
            whole += [slot] if is_whole else []
        logits = self.engine.feed(entries) if entries else []
        return list(zip(whole, logits, strict=True))
