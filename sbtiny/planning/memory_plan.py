"""Estimate a stage by arithmetic: memory by part against the free memory, the largest micro-batch, tokens. No torch.

Training holds the tensors of the backward pass for each token and layer. Their sizes below were counted with saved-tensor hooks on a
Llama with LoRA under autocast (dev/LOG.md). A GPU trains with gradient checkpointing: a layer keeps only its input, and one layer at a
time is computed again.
"""

from dataclasses import dataclass, replace
from typing import Any

from sbtiny.config import Settings
from sbtiny.models.device import CARDS, DeviceInfo, Dtype, pick_dtype
from sbtiny.models.shapes import HEAD_CHUNK, PREFILL_BATCH, Shape, slot_bytes
from sbtiny.planning.workload import PROMPT_TOKENS, StageName, StageWorkload

GB = 2**30
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64 weights, a float32 scale for 256 scales
ADAPTER = 16  # bytes a LoRA weight, in float32: the weight, its gradient, Adam's two moments
HEAD_TILE = (4096, 32_768)  # tokens and vocabulary entries that TRL's kernels score at once on a GPU
WORKSPACE = 0.6  # GiB of the libraries beside the logits, measured on an H200 (dev/LOG.md, 28)
LOGIT = 18  # bytes at most for a logit in sampling, and for a value of the feed-forward layers in prefill: 16 bits, float32 copies
PROCESS = {"cuda": 0.7, "cpu": 0.87}  # GiB: a CUDA context, not measured; Python with torch, trl and peft, measured
SAVED_16 = {"width": 18, "feed_forward": 8, "q": 6, "kv": 4, "rank": 14, "heads": 6}  # bytes a token and layer
SAVED_32 = {"width": 16, "feed_forward": 16, "q": 8, "kv": 8, "rank": 28, "heads": 6}
KV_COPIES = 2  # a padded micro-batch copies keys and values for every query head
RECORDED = (
    *("here", "dtype", "four_bit", "slots", "max_new_tokens", "micro_batch", "gradient_accumulation", "largest_micro_batch", "parts"),
    *("peak_gb", "free_gb", "tokens_at_most", "fits"),
)


def plan_memory(stage: StageName, settings: Settings, shape: Shape, seen: DeviceInfo, preset: str | None = None) -> "MemoryPlan":
    """Plan a stage for the GPU of this machine, else for the preset's card, else for this machine's CPU. `seen`: its device."""
    card = CARDS.get(preset or "") if seen.device == "cpu" else None
    return MemoryPlan(stage, settings, shape, card or seen, here=card is None)


def cap_micro_batch(settings: Settings, stage: StageName, shape: Shape, seen: DeviceInfo) -> Settings:
    """Settings with the largest micro-batch that fits this device, at most their own; unchanged when none fits."""
    plan = plan_memory(stage, settings, shape, seen)
    if stage not in ("sft", "grpo") or plan.largest_micro_batch == 0:
        return settings
    smaller = replace(getattr(settings, stage), micro_batch=min(plan.micro_batch, plan.largest_micro_batch))
    return replace(settings, **{stage: smaller})


@dataclass(frozen=True, slots=True)
class MemoryPlan(StageWorkload):
    """Memory of a stage on a device, by part. The peak takes only the larger of training and decoding, and the sum of the other parts."""

    shape: Shape
    target: DeviceInfo
    here: bool  # the target is this machine

    def record(self) -> dict[str, Any]:
        device = {"stage": self.stage, "device": self.target.name, "device_kind": self.target.device}
        return device | {name: getattr(self, name) for name in RECORDED}

    @property
    def dtype(self) -> Dtype:
        return pick_dtype(self.target.device, self.shape.parameters, self.target.capability, self.target.cpu_bf16)

    @property
    def four_bit(self) -> bool:
        return self.target.device == "cuda" if self.settings.four_bit is None else self.settings.four_bit

    @property
    def free_gb(self) -> float:
        return self.target.free_gb

    @property
    def peak_gb(self) -> float:
        return round(self.peak(self.micro_batch), 2)

    @property
    def fits(self) -> bool:
        return self.peak_gb <= self.free_gb

    @property
    def parts(self) -> dict[str, float]:
        """GiB of each part at the stage's micro-batch."""
        return {name: round(value, 3) for name, value in self.sizes(self.micro_batch).items()}

    @property
    def largest_micro_batch(self) -> int:
        """The largest that fits; 0 if none does."""
        return max((n for n in self.divisors() if self.peak(n) <= self.free_gb), default=0)

    @property
    def slots(self) -> int:
        if not self.decodes:
            return 0
        wanted, room = self.sampling.max_num_seqs, self.settings.kv_cache_gib
        return wanted if room is None else max(1, min(wanted, int(room * GB // self.bytes_per_slot)))

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one answer's keys and values."""
        capacity = -(-(PROMPT_TOKENS + self.max_new_tokens) // 64) * 64
        return slot_bytes(self.shape.layers, self.shape.kv, capacity, BYTES[self.dtype])

    def peak(self, micro_batch: int) -> float:
        """GiB at the peak."""
        parts = self.sizes(micro_batch)
        training = parts.pop("activations") + parts.pop("logits")
        decoding = parts.pop("decoding")
        return sum(parts.values()) + max(training, decoding)

    def sizes(self, micro_batch: int) -> dict[str, float]:
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
            return min(HEAD_CHUNK, tokens) * self.shape.vocabulary * BYTES[self.dtype]
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
