"""vLLM with our interface: unsloth's `fast_inference` engine where the model has one, else an engine of its own.

vLLM reads the adapter from a file, written again after each refresh. It samples by itself, so answers have no limits, cannot be
interrupted, and differ from our own engines' for the same seed.
"""

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from sbtiny.errors import InputError
from sbtiny.rollout.decode_engine import DecodeEngine, stop_mask
from sbtiny.rollout.episode import Episode, Request, StopReason, read_episode
from sbtiny.rollout.sampling import Sampling
from sbtiny.rollout.session import BatchSession, Ticket

GPU_MEMORY_SHARE = 0.3  # of the GPU; TRL's value for an engine beside the model in training
STOP_REASONS: dict[str, StopReason] = {"stop": "end", "length": "length"}


def require_vllm() -> None:
    """Raise InputError where vLLM is not installed; call it before loading a model."""
    if not find_spec("vllm"):
        raise InputError("engine vllm: vllm is not installed: pip install vllm, or use --engine ours or generate")


class VllmEngine(DecodeEngine):
    """Decodes at most `slots` answers at once with `kv_cache_gib` GiB of keys and values (default: within 30 % of the GPU)."""

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[str],
        stop_ids: frozenset[int],
        slots: int = 64,
        kv_cache_gib: float | None = None,
    ) -> None:
        require_vllm()
        self.model, self.pieces, self.slots, self.kv_cache_gib = model, pieces, slots, kv_cache_gib
        self.stops, self.stop_ids = stop_mask(stop_ids, len(pieces)), sorted(stop_ids)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)
        self.llm: Any = getattr(model, "vllm_engine", None)
        self.capacity = float("inf") if self.llm is not None else 0
        self.folder, self.refreshed, self.adapter = TemporaryDirectory(prefix="sbtiny-vllm-"), 0, None
        self.refresh()

    def refresh(self) -> None:
        """Write the adapter for the next call, under a new number because vLLM caches adapters by number."""
        layers = [m for m in self.model.modules() if hasattr(m, "lora_A") and hasattr(m, "disable_adapters")]
        self.adapter = None
        if any(not layer.disable_adapters for layer in layers):
            from vllm.lora.request import LoRARequest

            shutil.rmtree(Path(self.folder.name) / str(self.refreshed), ignore_errors=True)
            self.refreshed += 1
            folder = Path(self.folder.name) / str(self.refreshed)
            self.model.save_pretrained(folder)
            self.adapter = LoRARequest(f"sbtiny-{self.refreshed}", self.refreshed, str(folder))

    def check_room(self, tokens: int) -> None:
        """Do nothing: vLLM checks its memory when it starts."""

    def open_session(self, capacity: int, kept_prefixes: int = 0) -> BatchSession:
        self._reserve(capacity)
        return BatchSession(self._decode, self.make_ticket, rows=sys.maxsize)

    def make_ticket(self, request: Request, sampling: Sampling) -> Ticket:
        if not request.is_unlimited or sampling.logprobs:
            raise InputError("engine vllm knows neither limits nor interruption nor log-probabilities: use --engine ours")
        return super().make_ticket(request, sampling)

    def _decode(self, tickets: list[Ticket]) -> None:
        """Decode a batch to its end."""
        prompts = [{"prompt_token_ids": list(t.request.prompt_ids)} for t in tickets]
        parameters = [self._parameters(t.request, t.sampling) for t in tickets]
        outputs = self.llm.generate(prompts, parameters, lora_request=self.adapter, use_tqdm=False)
        for ticket, output in zip(tickets, outputs, strict=True):
            ticket.episode = self._read(ticket.request, output.outputs[0])

    def _read(self, request: Request, output: Any) -> Episode:
        return read_episode(request, list(output.token_ids), self.pieces, STOP_REASONS[output.finish_reason])

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            seed=request.seed % 2**63,
            max_tokens=request.max_tokens,
            stop_token_ids=self.stop_ids,
            detokenize=False,
        )

    def _reserve(self, capacity: int) -> None:
        """Make an engine for sequences of `capacity` tokens; longer ones need a new engine."""
        if capacity <= self.capacity:
            return
        from vllm import LLM

        self.llm, self.capacity = None, -(-capacity // 64) * 64  # free the old engine's memory first
        config = self.model.config
        ranks = [c.r for c in getattr(self.model, "peft_config", {}).values()]
        room = {} if self.kv_cache_gib is None else {"kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30)}
        four_bit = getattr(config, "quantization_config", None) is not None
        self.llm = LLM(
            model=config._name_or_path,
            dtype=str(self.model.dtype).removeprefix("torch."),
            max_model_len=self.capacity,
            max_num_seqs=self.slots,
            gpu_memory_utilization=GPU_MEMORY_SHARE,
            enable_lora=bool(ranks),
            max_lora_rank=max(ranks, default=16),
            generation_config="vllm",  # not the model's: its penalties and defaults must not apply
            skip_tokenizer_init=True,
            **({"quantization": "bitsandbytes"} if four_bit else {}),
            **room,
        )
