"""Estimate a stage by arithmetic: memory by part against the free memory, the largest micro-batch, tokens. No torch.

Training holds the tensors of the backward pass for each token and layer. Their sizes below were counted with saved-tensor hooks on a
Llama with LoRA under autocast (dev/LOG.md). A GPU trains with gradient checkpointing: a layer keeps only its input, and one layer at a
time is computed again.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from sbtiny.config import Settings
from sbtiny.models.device import CARDS, Device, DeviceInfo, Dtype, pick_dtype
from sbtiny.models.shapes import HEAD_CHUNK, PREFILL_BATCH, Shape, slot_bytes
from sbtiny.planning.workload import PROMPT_TOKENS, StageName, StageWorkload

GB = 2**30
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64 weights, a float32 scale for 256 scales
ADAPTER = 16  # bytes a LoRA weight, in float32: the weight, its gradient, Adam's two moments
HEAD_TILE = (4096, 32_768)  # tokens and vocabulary entries that TRL's kernels score at once on a GPU
WORKSPACE = 0.6  # GiB of the libraries beside the logits, measured on an H200 (dev/LOG.md, 28)
LOGIT = 18  # bytes a logit at the peak: a 16-bit score, then float32 score, log-probability, gradient and a temporary
PROCESS = {"cuda": 0.7, "cpu": 0.87}  # GiB: a CUDA context, not measured; Python with torch, trl and peft, measured
SAVED_16 = {"width": 18, "feed_forward": 8, "q": 6, "kv": 4, "rank": 14, "heads": 6}  # bytes a token and layer
SAVED_32 = {"width": 16, "feed_forward": 16, "q": 8, "kv": 8, "rank": 28, "heads": 6}
KV_COPIES = 2  # a padded micro-batch copies keys and values for every query head


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory of a stage in GiB, by part. The peak takes only the larger of training and decoding, and the sum of the other parts."""

    stage: StageName
    device: str
    device_kind: Device
    here: bool
    dtype: Dtype
    four_bit: bool
    slots: int
    micro_batch: int
    gradient_accumulation: int  # forward passes of one process in an update; 0 without training
    largest_micro_batch: int
    parts: dict[str, float]
    peak_gb: float
    free_gb: float
    tokens_at_most: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.peak_gb <= self.free_gb

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def plan_memory(stage: StageName, settings: Settings, shape: Shape, seen: DeviceInfo, preset: str | None = None) -> MemoryPlan:
    """Plan a stage for the GPU of this machine, else for the preset's card, else for this machine's CPU. `seen`: its device."""
    card = CARDS.get(preset or "") if seen.device == "cpu" else None
    target = card or seen
    dtype = pick_dtype(target.device, shape.parameters, target.capability, target.cpu_bf16)
    four_bit = target.device == "cuda" if settings.four_bit is None else settings.four_bit
    memory = StageMemory(stage, settings, shape, target, dtype, four_bit)
    micro, free = memory.micro_batch, target.free_gb
    return MemoryPlan(
        stage=stage,
        device=target.name,
        device_kind=target.device,
        here=card is None,
        dtype=dtype,
        four_bit=four_bit,
        slots=memory.slots,
        micro_batch=micro,
        gradient_accumulation=memory.grad_accum_steps,
        largest_micro_batch=max((m for m in memory.divisors() if memory.peak(m) <= free), default=0),
        parts={name: round(value, 3) for name, value in memory.parts(micro).items()},
        peak_gb=round(memory.peak(micro), 2),
        free_gb=free,
        tokens_at_most=memory.tokens(),
    )


def cap_micro_batch(settings: Settings, stage: StageName, shape: Shape, seen: DeviceInfo) -> Settings:
    """Settings with the largest micro-batch that fits this device, at most their own; unchanged when none fits."""
    plan = plan_memory(stage, settings, shape, seen)
    if stage not in ("sft", "grpo") or plan.largest_micro_batch == 0:
        return settings
    section = getattr(settings, stage)
    smaller = replace(section, micro_batch=min(plan.micro_batch, plan.largest_micro_batch))
    return replace(settings, **{stage: smaller})


@dataclass(frozen=True, slots=True)
class StageMemory(StageWorkload):
    """Computes the memory of one stage on one device."""

    shape: Shape
    target: DeviceInfo
    dtype: Dtype
    four_bit: bool

    @property
    def slots(self) -> int:
        if not self.decodes:
            return 0
        section = {"sft": "data"}.get(self.stage, self.stage)  # the cold start may first sample its own rows
        wanted, room = getattr(self.settings, section).max_num_seqs, self.settings.kv_cache_gib
        return wanted if room is None else max(1, min(wanted, int(room * GB // self.bytes_per_slot)))

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one answer's keys and values."""
        capacity = -(-(PROMPT_TOKENS + self.max_new_tokens) // 64) * 64
        return slot_bytes(self.shape.layers, self.shape.kv, capacity, BYTES[self.dtype])

    def peak(self, micro_batch: int) -> float:
        """GiB at the peak."""
        parts = self.parts(micro_batch)
        training = parts.pop("activations") + parts.pop("logits")
        decoding = parts.pop("decoding")
        return sum(parts.values()) + max(training, decoding)

    def parts(self, micro_batch: int) -> dict[str, float]:
        """GiB of each part. Training has `activations` and `logits`, sampling has `decoding`."""
        s, width = self.shape, BYTES[self.dtype]
        tokens = micro_batch * (self.max_row_tokens + self.contrast_tokens)
        sizes = {
            "process": PROCESS[self.target.device] * GB,
            "weights": s.linear * (NF4 if self.four_bit else width) + (s.parameters - s.linear) * width,
            "decode_copy": s.linear * width * (self.settings.engine != "generate"),  # ours: folded and fused; vllm: its own
            "lora_and_adam": s.lora(self.settings.sft.lora_rank) * ADAPTER if self.rows else 0,
            "kv_slots": self.slots * self.bytes_per_slot,
            "activations": tokens * self.saved_bytes_per_token() + tokens * self.max_row_tokens * width,  # plus the mask of a padded batch
            "logits": self.logits(tokens),
            "decoding": (self.slots * s.vocabulary + PREFILL_BATCH * PROMPT_TOKENS * s.feed_forward) * LOGIT if self.decodes else 0,
        }
        return {name: value / GB for name, value in sizes.items()}

    def logits(self, tokens: int) -> float:
        """Bytes of the logits in memory at once: whole rows on a CPU (training/logprobs.py), a tile of TRL's kernels on a GPU."""
        if self.target.device == "cpu":
            return min(HEAD_CHUNK, tokens) * self.shape.vocabulary * LOGIT
        rows, columns = HEAD_TILE
        return min(rows, tokens) * min(columns, self.shape.vocabulary) * BYTES[self.dtype] + WORKSPACE * GB

    def saved_bytes_per_token(self) -> float:
        """Bytes of a token's tensors for the backward pass."""
        s = self.shape
        half = self.target.device == "cuda" or self.target.cpu_bf16  # autocast, for weights of every dtype
        counts = SAVED_16 if half else SAVED_32
        sizes = {name: getattr(s, name) for name in ("width", "feed_forward", "q", "kv", "heads")}
        layer = sum(counts[name] * size for name, size in (sizes | {"rank": self.settings.sft.lora_rank}).items())
        width = 2 if half else 4
        layer += KV_COPIES * s.q * width
        return s.layers * layer if self.target.device == "cpu" else s.layers * s.width * width + layer
