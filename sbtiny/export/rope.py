"""Rotary scaling in a GGUF file: check that llama.cpp computes it as transformers does, and write its fields."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sbtiny.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

SCALINGS = ("default", "linear", "yarn", "llama3")
# llama.cpp uses these for our architectures whatever the file holds (tested with llama-cpp-python 0.3.36).
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def check_rope_scaling(config: Any) -> None:
    """Raises InputError for scaling that llama.cpp computes otherwise than transformers."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind not in SCALINGS:
        raise InputError(f"no GGUF for {kind!r} rotary scaling: {', '.join(SCALINGS)} work; use --gguf none")
    if kind == "llama3" and config.model_type != "llama":
        raise InputError(f"no GGUF for 'llama3' rotary scaling in a {config.model_type!r} model: llama.cpp lacks it; use --gguf none")
    factor = rope.get("factor")
    known = isinstance(factor, int | float) and factor > 0
    if kind != "default" and not known and not (factor is None and kind == "yarn" and rope.get("original_max_position_embeddings")):
        raise InputError(f"{kind!r} rotary scaling with the factor {factor!r}: config.json needs a number above 0 there")
    if (part := rope.get("partial_rotary_factor") or 1) != 1:
        raise InputError(f"no GGUF for a partial_rotary_factor of {part}: llama.cpp turns whole heads; use --gguf none")
    for name, value in YARN_DEFAULTS.items() if kind == "yarn" else ():
        if (other := rope.get(name)) not in (None, value):
            raise InputError(f"no GGUF for 'yarn' rotary scaling with {name} = {other}: llama.cpp always takes {value}; use --gguf none")


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_rope_scaling(writer: "GGUFWriter", config: Any) -> None:
    """Write linear and YaRN scaling as fields. llama3's is a tensor, see `llama3_factors`."""
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(scaling_factor(config))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        paper = 0.1 * math.log(scaling_factor(config)) + 1 if scaling_factor(config) > 1 else 1.0
        # llama.cpp multiplies this with the paper's factor. It does not read its field yarn_attn_factor for these architectures.
        writer.add_rope_scaling_attn_factors(attention_factor / paper)


def scaling_factor(config: Any) -> float:
    """Longest context over that of pre-training."""
    rope = config.rope_parameters
    return rope["factor"] or config.max_position_embeddings / rope["original_max_position_embeddings"]


def llama3_factors(config: Any) -> np.ndarray | None:
    """Divisor of each rotary frequency in Llama 3.1, (head_dim / 2,) float32; None for other scalings."""
    rope, head = config.rope_parameters, head_size(config)
    if rope["rope_type"] != "llama3":
        return None
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / (smooth + (1 - smooth) / rope["factor"])).astype(np.float32)
