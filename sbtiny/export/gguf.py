"""Write a GGUF file of the Llama, Qwen2 or Qwen3 architecture, tensor by tensor, in little memory."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbtiny.errors import InputError
from sbtiny.export import rope
from sbtiny.export.gguf_tokenizer import Vocabulary, add_special, add_tokens
from sbtiny.models.shapes import ARCHITECTURES
from sbtiny.models.tensor_faults import EMBEDDING, HEAD

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

    from sbtiny.export.merge import Merged

KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def check_architecture(config: Any) -> None:
    """Raises InputError for an architecture that would be written wrongly; names those that work."""
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"no GGUF for a {config.model_type!r} model: {', '.join(ARCHITECTURES)} work; use --gguf none")
    rope.check_rope_scaling(config)
    if config.model_type == "qwen3" and config.attention_bias:
        raise InputError("no GGUF for a 'qwen3' model with attention_bias: llama.cpp has no bias for its o_proj; use --gguf none")
    if getattr(config, "use_sliding_window", False):
        raise InputError("no GGUF for sliding-window attention in these architectures: use --gguf none")


def write_gguf(
    file: Path,
    kind: str,
    merged: "Merged",
    config: Any,
    tokenizer: "PreTrainedTokenizerBase",
    vocabulary: Vocabulary,
    stops: list[int],
    name: str,
) -> Iterator[str]:
    """Write `file`, yielding the name of each tensor as it is written."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(file, config.model_type)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    writer.add_quantization_version(2)
    add_shape(writer, config, merged.tensors[EMBEDDING].shape[0])
    add_tokens(writer, vocabulary)
    add_special(writer, tokenizer, stops)
    factors = rope.llama3_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    names = {given: gguf_name(given, config) for given in merged.tensors}
    for given, tensor in merged.tensors.items():
        add_tensor_info(writer, names[given], tensor.shape, tensor_type(kind, given, tensor.shape))
    try:
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
            step()
        if factors is not None:
            writer.write_tensor_data(factors)
        for given in merged.tensors:
            writer.write_tensor_data(tensor_bytes(merged, given, config, kind))
            yield given
    finally:
        writer.close()


def add_shape(writer: "GGUFWriter", config: Any, vocabulary: int) -> None:
    head = rope.head_size(config)
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope.add_rope_scaling(writer, config)


def gguf_name(name: str, config: Any) -> str:
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = MODEL_ARCH[config.model_type.upper()]
    renamed = get_tensor_name_map(arch, config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if renamed is None:
        raise InputError(f"no GGUF name for the tensor {name} in a {config.model_type} model: use --gguf none")
    return renamed


def tensor_type(kind: str, name: str, shape: tuple[int, ...]) -> "GGMLQuantizationType":
    """The type of `kind`, but float32 for norms and biases, and float16 where a row is no multiple of a block.

    Of the quantised kinds, embedding and head have 8 bits: they bear less rounding.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType["Q8_0" if kind.startswith("q") and name in (EMBEDDING, HEAD) else kind.upper()]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def add_tensor_info(writer: "GGUFWriter", name: str, shape: tuple[int, ...], kind: "GGMLQuantizationType") -> None:
    from gguf.quants import quant_shape_to_byte_shape

    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    if plain:
        writer.add_tensor_info(name, shape, np.dtype(plain), math.prod(shape) * np.dtype(plain).itemsize)
    else:
        packed = quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), math.prod(packed), raw_dtype=kind)


def tensor_bytes(merged: "Merged", name: str, config: Any, kind: str) -> np.ndarray:
    """The tensor as stored: in llama.cpp's rotary layout, quantised. Raises InputError where float16 overflows."""
    from gguf.quants import quantize

    weight = merged[name].numpy()
    if config.model_type == "llama":
        if ".q_proj." in name:
            weight = interleave_rope_rows(weight, config.num_attention_heads)
        elif ".k_proj." in name:
            weight = interleave_rope_rows(weight, config.num_key_value_heads)
    data = quantize(weight, tensor_type(kind, name, weight.shape))
    if data.dtype == np.float16 and not np.isfinite(data).all():
        raise InputError(f"{name} does not fit into float16: use --gguf bf16 or q8_0")
    return data


def interleave_rope_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows (heads x head_dim, ...) from transformers' rotary layout (two halves a head) to llama.cpp's (adjacent pairs)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
