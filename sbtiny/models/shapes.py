"""The shape of a model, from which memory and time are estimated before loading. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtiny.errors import InputError
from sbtiny.models.aliases import ALIASES, resolve

ARCHITECTURES = ("llama", "qwen2", "qwen3")
PREFILL_BATCH = 32  # prompts that the decode loop computes in one call, before their slots are free
PREFILL_PLACES = 8192  # tokens of such a call, each prompt padded to the longest: 32 long ones would take gigabytes
HEAD_CHUNK = 256  # tokens with logits in memory at once on a CPU


def slot_bytes(layers: int, kv: int, capacity: int, number: int) -> int:
    """Bytes of the KV cache of `capacity` tokens. `kv`: width of the keys of a layer. `number`: bytes of one value."""
    return layers * 2 * kv * capacity * number


def config_slot_bytes(config: Any, capacity: int, number: int) -> int:
    """The same for transformers' text config of any model; 0 for one without attention heads."""
    if not (heads := getattr(config, "num_attention_heads", None)):
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return slot_bytes(config.num_hidden_layers, kv_heads * head_dim, capacity, number)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama, Qwen2 or Qwen3 decoder: counts and widths. `bias`: q, k and v have one. `qk_norm`: q and k are normalised."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    bias: bool = False
    qk_norm: bool = False

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    def matrices(self) -> Iterator[tuple[int, int]]:
        """(in, out) of the seven linear layers of a block: q, k, v, o, gate, up, down. LoRA and NF4 apply to all of them."""
        w, f = self.width, self.feed_forward
        yield from ((w, self.q), (w, self.kv), (w, self.kv), (self.q, w), (w, f), (w, f), (f, w))

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of all blocks."""
        return self.layers * sum(i * o for i, o in self.matrices())

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head unless it is tied."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        small = 2 * self.width + (self.q + 2 * self.kv if self.bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        return self.linear + self.table + self.layers * small + self.width

    def lora(self, rank: int) -> int:
        """Parameters of an adapter on all linear layers."""
        return self.layers * rank * sum(i + o for i, o in self.matrices())


# From the config.json of each. A test compares their parameters with those of the aliases.
SHAPES = {
    "qwen-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151_936, tied=False, bias=True),
    "qwen-7b": Shape(28, 3584, 18_944, 28, 4, 128, 152_064, tied=False, bias=True),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8, 128, 151_936, tied=True, qk_norm=True),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True),
}


def shape_of(name: str) -> Shape:
    """The shape of an alias, its hub id, or a folder. Raises InputError for other models."""
    source = resolve(name)
    if source.kind in ("bundled", "folder"):
        return read_shape(Path(source.ref) / "config.json")
    alias = next((alias for alias in ALIASES if source.name in (alias.name, alias.hub_id)), None)
    if alias is None:
        raise InputError(f"the shape of {name} is not known before it is read: give an alias (sbtiny models) or a folder with config.json")
    return SHAPES[alias.name]


def read_shape(file: Path) -> Shape:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return to_shape(config, file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}; give a model's whole folder") from error
    except KeyError as error:
        raise InputError(f"{file} has no {error}: give the folder of a Llama, Qwen2 or Qwen3 model") from error


def to_shape(config: dict[str, Any], file: Path) -> Shape:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"{file} is of a {kind!r} model: sbtiny knows {', '.join(ARCHITECTURES)}")
    heads = config["num_attention_heads"]
    return Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or config["hidden_size"] // heads,
        config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )
