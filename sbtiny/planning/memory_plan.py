"""What a stage will take, by arithmetic alone: memory part by part against what is free, the largest micro-batch, tokens. No torch.

Training holds for each token and layer what its backward pass needs. The counts below were taken with saved-tensor hooks on a
Llama with LoRA under autocast (dev/LOG.md); with gradient checkpointing, which a GPU gets, a layer keeps only its input and one
layer at a time is computed again.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from sbtiny.config import Settings
from sbtiny.models.device import CARDS, Device, Dtype, Seen, pick_dtype
from sbtiny.models.shapes import Shape, slot_bytes
from sbtiny.planning.workload import PROMPT, Stage, Work

GB = 2**30
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64, a float32 scale for 256 of those
ADAPTER = 16  # bytes a LoRA weight, all in float32: itself, its gradient, the two moments of Adam
HEAD_CHUNK = 1024  # tokens whose logits exist at once on a CPU (training/logprobs.py)
HEAD_TILE = (4096, 32_768)  # tokens and vocabulary that TRL's kernels score at once on a GPU
WORKSPACE = 0.6  # GiB that libraries hold beside them, measured on an H200 (dev/LOG.md, 28)
LOGIT = 18  # bytes a logit at the worst moment: the score in 16 bits, then float32 score, log-probability, gradient, a spare
STAGED = 32  # prompts that are computed together
PROCESS = {"cuda": 0.7, "cpu": 0.87}  # GiB: a CUDA context, not measured; Python with torch, trl and peft, measured
SAVED_16 = {"width": 18, "feed_forward": 8, "q": 6, "kv": 4, "rank": 14, "heads": 6}  # bytes a token and layer
SAVED_32 = {"width": 16, "feed_forward": 16, "q": 8, "kv": 8, "rank": 28, "heads": 6}
REPEATED = 2  # with padding in the micro-batch, keys and values are copied for every head of queries


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory in GiB by part. Weights, decode copy, adapter and cache stay; of training and decoding only the larger counts."""

    stage: Stage
    device: str
    device_kind: Device
    here: bool
    dtype: Dtype
    four_bit: bool
    slots: int
    micro_batch: int
    gradient_accumulation: int  # forward passes an update, of one process; 0 where nothing is trained
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


def plan(stage: Stage, settings: Settings, shape: Shape, seen: Seen, preset: str | None = None) -> Plan:
    """The plan of a stage on the GPU that is here, else on the card the preset is made for, else on this machine's processor."""
    card = CARDS.get(preset or "") if seen.device == "cpu" else None
    target = card or seen
    dtype = pick_dtype(target.device, shape.parameters, target.capability, target.cpu_bf16)
    four_bit = target.device == "cuda" if settings.four_bit is None else settings.four_bit
    size = Size(stage, settings, shape, target, dtype, four_bit)
    micro, free = size.micro_batch, target.free_gb
    largest = max((m for m in size.divisors() if size.peak(m) <= free), default=0)
    parts = {name: round(value, 3) for name, value in size.parts(micro).items()}
    place = (target.name, target.device, card is None, dtype, four_bit)
    return Plan(stage, *place, size.slots, micro, size.passes, largest, parts, round(size.peak(micro), 2), free, size.tokens())


def fitted(settings: Settings, stage: Stage, shape: Shape, seen: Seen) -> Settings:
    """The settings with the largest micro-batch that fits what is free here, at most the one they name; unchanged when none does."""
    found = plan(stage, settings, shape, seen)
    if stage not in ("sft", "grpo") or found.largest_micro_batch == 0:
        return settings
    section = getattr(settings, stage)
    smaller = replace(section, micro_batch=min(found.micro_batch, found.largest_micro_batch))
    return replace(settings, **{stage: smaller})


@dataclass(frozen=True, slots=True)
class Size(Work):
    """The arithmetic of one stage on one device."""

    shape: Shape
    target: Seen
    dtype: Dtype
    four_bit: bool

    @property
    def slots(self) -> int:
        if not self.decodes:
            return 0
        section = {"sft": "data"}.get(self.stage, self.stage)  # the cold start may sample its own rows first
        wanted, room = getattr(self.settings, section).slots, self.settings.kv_memory
        return wanted if room is None else max(1, min(wanted, int(room * GB // self.slot)))

    @property
    def slot(self) -> int:
        """Bytes of one answer's keys and values."""
        capacity = -(-(PROMPT + self.answer) // 64) * 64
        return slot_bytes(self.shape.layers, self.shape.kv, capacity, BYTES[self.dtype])

    def peak(self, micro_batch: int) -> float:
        """GiB at the worst moment."""
        parts = self.parts(micro_batch)
        training = parts.pop("activations") + parts.pop("logits")
        decoding = parts.pop("decoding")
        return sum(parts.values()) + max(training, decoding)

    def parts(self, micro_batch: int) -> dict[str, float]:
        """GiB of each part; `activations` and `logits` are of training, `decoding` of sampling."""
        s, number = self.shape, BYTES[self.dtype]
        tokens = micro_batch * (self.longest + self.beside)
        found = {
            "process": PROCESS[self.target.device] * GB,
            "weights": s.linear * (NF4 if self.four_bit else number) + (s.parameters - s.linear) * number,
            "decode_copy": s.linear * number * (self.settings.engine != "generate"),  # ours: folded and fused; vllm: its own
            "lora_and_adam": s.lora(self.settings.sft.lora_rank) * ADAPTER if self.rows else 0,
            "kv_slots": self.slots * self.slot,
            "activations": tokens * self.saved() + tokens * self.longest * number,  # and the mask of a padded batch
            "logits": self.logits(tokens),
            "decoding": (self.slots * s.vocabulary + STAGED * PROMPT * s.feed_forward) * LOGIT if self.decodes else 0,
        }
        return {name: value / GB for name, value in found.items()}

    def logits(self, tokens: int) -> float:
        """Bytes of the logits held at a time: whole rows on a CPU (training/logprobs.py), a tile in TRL's kernels on a GPU."""
        if self.target.device == "cpu":
            return min(HEAD_CHUNK, tokens) * self.shape.vocabulary * LOGIT
        rows, columns = HEAD_TILE
        return min(rows, tokens) * min(columns, self.shape.vocabulary) * BYTES[self.dtype] + WORKSPACE * GB

    def saved(self) -> float:
        """Bytes a token keeps for the backward pass."""
        s = self.shape
        half = self.target.device == "cuda" or self.target.cpu_bf16  # autocast, whatever the weights are
        counts = SAVED_16 if half else SAVED_32
        sizes = {name: getattr(s, name) for name in ("width", "feed_forward", "q", "kv", "heads")}
        layer = sum(counts[name] * size for name, size in (sizes | {"rank": self.settings.sft.lora_rank}).items())
        number = 2 if half else 4
        layer += REPEATED * s.q * number
        return s.layers * layer if self.target.device == "cpu" else s.layers * s.width * number + layer
