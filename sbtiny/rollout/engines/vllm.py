"""vLLM with our interface: unsloth's `fast_inference` engine where the model has one, else an engine of its own, in this process.

vLLM reads the adapter from a file, written again after each refresh. It samples by itself: an answer's text depends on its seed, but is
not our own engines'. Limits are ours (`vllm_session`).
"""

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from sbtiny import distributed
from sbtiny.errors import InputError
from sbtiny.models.shapes import config_slot_bytes
from sbtiny.rollout.decode_engine import DecodeEngine, stop_mask
from sbtiny.rollout.engines.vllm_session import VllmSession
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.memory import fit_slots
from sbtiny.rollout.sampling import TagMask
from sbtiny.rollout.session import Ticket

GPU_MEMORY_SHARE = 0.3  # of the GPU; TRL's value for an engine beside the model in training
PROMPT_ROOM = 512  # tokens of a prompt, so that one engine holds the longest answers: another one takes seconds to start
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # largest adapter ranks that vLLM can be set to
CPU_BLOCK = 32  # tokens; vLLM's 128 would keep no short prompt
ENVIRONMENT = {  # what the user has set wins
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its own process would need a guarded __main__, and import torch again
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm(backend: str = "auto", four_bit: bool = False) -> None:
    """Raise InputError where vLLM is not installed or cannot decode what is asked for; call it before loading a model."""
    if not find_spec("vllm"):
        wanted = "pip install vllm (on a CPU: make vllm-env), or use --engine ours or generate"
        raise InputError(f"engine vllm: vllm is not installed: {wanted}")
    if distributed.world_size() > 1:
        raise InputError("engine vllm decodes in one process, not beside others: use --engine ours, or start one process")
    if torch.cuda.is_available():
        return
    if four_bit:
        raise InputError("engine vllm on a CPU has no 4-bit layers: add --no-4bit, or use --engine ours")
    if backend == "unsloth":
        raise InputError("engine vllm with backend unsloth needs a GPU: use --backend transformers, or --engine ours")


class VllmEngine(DecodeEngine):
    """Decodes at most `slots` answers at once with `kv_cache_gib` GiB of keys and values.

    By default these take what fits of the free memory, on a GPU what vLLM finds within 30 % of it.
    """

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[str],
        stop_ids: frozenset[int],
        slots: int = 64,
        kv_cache_gib: float | None = None,
    ) -> None:
        require_vllm(four_bit=getattr(model.config, "quantization_config", None) is not None)
        # Its warnings on a CPU, a dozen a start, are about what is chosen here: one process, no compiler, no preloaded allocator.
        level = "ERROR" if model.device.type == "cpu" else "WARNING"
        for name, value in (ENVIRONMENT | {"VLLM_LOGGING_LEVEL": level}).items():
            os.environ.setdefault(name, value)
        self.model, self.pieces, self.slots, self.kv_cache_gib = model, pieces, slots, kv_cache_gib
        self.rows, self.tag_mask = slots, TagMask(pieces)
        self.stops, self.stop_ids = stop_mask(stop_ids, len(pieces)), sorted(stop_ids)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)
        self.brought: Any = getattr(model, "vllm_engine", None)
        self.core: Any = self.brought and self.brought.llm_engine
        self.capacity = self.longest = 0
        self.session: VllmSession | None = None
        self.folder, self.refreshed, self.adapter = TemporaryDirectory(prefix="sbtiny-vllm-"), 0, None
        self.refresh()

    def refresh(self) -> None:
        """Write the adapter for the next answers, under a new number because vLLM keeps adapters and prompts by number."""
        layers = [m for m in self.model.modules() if hasattr(m, "lora_A") and hasattr(m, "disable_adapters")]
        self.adapter = None
        if any(not layer.disable_adapters for layer in layers):
            from vllm.lora.request import LoRARequest

            shutil.rmtree(Path(self.folder.name) / str(self.refreshed), ignore_errors=True)
            self.refreshed += 1
            folder = Path(self.folder.name) / str(self.refreshed)
            self.model.save_pretrained(folder)
            self.adapter = LoRARequest(f"sbtiny-{self.refreshed}", self.refreshed, str(folder))

    def slot_bytes(self, capacity: int) -> int:
        """Bytes of the keys and values of one sequence."""
        return config_slot_bytes(self.model.config.get_text_config(), capacity, self.model.dtype.itemsize)

    def check_room(self, tokens: int) -> None:
        fit_slots(self.slot_bytes(tokens), 1, self.kv_cache_gib, self.model.device)
        self.longest = min(tokens + PROMPT_ROOM, self.max_positions or tokens + PROMPT_ROOM)

    def open_session(self, capacity: int, kept_prefixes: int = 0) -> VllmSession:
        """Open a session. vLLM keeps the prefixes that fit, however many."""
        if self.session is not None:
            self.session.close()
        self._reserve(max(capacity, self.longest))
        self.session = VllmSession(self)
        return self.session

    def make_ticket(self, request: Request, sampling: Sampling) -> Ticket:
        truncates = sampling.top_k or sampling.top_p < 1 or sampling.min_p
        if sampling.logprobs and (self.brought or (truncates and sampling.temperature)):
            raise InputError("engine vllm has no log-probabilities of truncated sampling, nor under unsloth: use --engine ours")
        return super().make_ticket(request, sampling)

    def _reserve(self, capacity: int) -> None:
        """Start vLLM for sequences of `capacity` tokens; longer ones need another start."""
        if capacity <= self.capacity and self.core is not None:  # a larger one may have been refused
            return
        if self.brought:
            self.capacity = self.core.model_config.max_model_len
            return
        if self.core is not None:
            self.core.engine_core.shutdown()  # free the old memory first
        self.core, self.capacity = None, min(-(-capacity // 64) * 64, self.max_positions or capacity + 64)
        with undisturbed():
            self.core = self._start()

    def _start(self) -> Any:
        from vllm import LLM

        config, on_cpu = self.model.config, self.model.device.type == "cpu"
        ranks = [c.r for c in getattr(self.model, "peft_config", {}).values()]
        four_bit = getattr(config, "quantization_config", None) is not None
        try:
            llm = LLM(
                model=config._name_or_path,
                dtype=str(self.model.dtype).removeprefix("torch."),
                max_model_len=self.capacity,
                max_num_seqs=self.slots,
                kv_cache_memory_bytes=self._cache_bytes(),
                gpu_memory_utilization=GPU_MEMORY_SHARE,
                enable_lora=bool(ranks),
                max_lora_rank=fit_rank(max(ranks, default=16)),
                logprobs_mode="processed_logprobs",  # under the temperature, as ours
                generation_config="vllm",  # not the model's: its penalties and defaults must not apply
                use_tqdm_on_load=False,
                **({"enforce_eager": True, "block_size": CPU_BLOCK} if on_cpu else {}),  # to compile takes longer than it saves
                **({"quantization": "bitsandbytes"} if four_bit else {}),
            )
        except ValueError as error:  # pydantic's too
            reason = " ".join(str(error).split())
            raise InputError(f"vLLM cannot start for {config._name_or_path}: {reason}; use --engine ours or generate") from error
        return llm.llm_engine

    def _cache_bytes(self) -> int | None:
        """Bytes of all keys and values. None leaves them to vLLM, which measures a GPU. One block more is vLLM's own."""
        if self.kv_cache_gib is not None:
            return int(self.kv_cache_gib * 2**30)
        if self.model.device.type != "cpu":
            return None
        slot = self.slot_bytes(self.capacity)
        return (fit_slots(slot, self.slots, None, self.model.device)[0] + 1) * slot


def fit_rank(rank: int) -> int:
    """The smallest rank of vLLM's that holds the adapter's. Raises InputError for one above them all."""
    if rank > RANKS[-1]:
        raise InputError(f"engine vllm takes adapters up to rank {RANKS[-1]}, not {rank}: use --engine ours")
    return next(r for r in RANKS if r >= rank)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what vLLM's start does to this process: it seeds every generator, and on a CPU takes `torch.set_num_threads` away."""
    states, set_threads, threads = (random.getstate(), np.random.get_state()), torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])
