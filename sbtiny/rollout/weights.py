"""A copy of the policy's weights for decoding: adapters folded in, 4-bit unpacked, q/k/v and gate/up fused.

Decoding through LoRA costs two more products per layer, through NF4 an unpacking per product. Folding once per update costs a fraction of
a step. The copy is refreshed in place, so memory does not grow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbtiny.errors import InputError

SUPPORTED = ("llama", "qwen2", "qwen3")
DYNAMIC_ROPE = ("dynamic", "longrope")  # their frequencies depend on the length of the sequence
WITHOUT_BIAS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def merged_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The effective weight (out, in) of a linear module: the base, unpacked if 4-bit, plus its LoRA products unless disabled."""
    base = getattr(module, "base_layer", module)
    weight = base.weight.data
    if (state := getattr(base.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, state)
    adapters = () if getattr(module, "disable_adapters", True) else module.active_adapters
    for name in adapters:
        if name in module.lora_A:
            a, b = module.lora_A[name].weight.data, module.lora_B[name].weight.data
            weight = weight.float() + module.scaling[name] * (b.float() @ a.float())
    return weight.to(dtype)


def linear_bias(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    bias = getattr(module, "base_layer", module).bias
    return None if bias is None else bias.data.to(dtype)


def concat_bias(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


@dataclass(slots=True)
class Layer:
    """One decoder layer: matrices (out, in), norms (width,), all in the decode dtype."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norm_attention: Tensor
    norm_mlp: Tensor
    norm_q: Tensor | None
    norm_k: Tensor | None

    def tensors(self) -> list[Tensor]:
        values = (getattr(self, name) for name in self.__slots__)
        return [tensor for tensor in values if tensor is not None]


def read_layer(layer: nn.Module, dtype: torch.dtype) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    return Layer(
        qkv=torch.cat([merged_weight(p, dtype) for p in projections]),
        qkv_bias=concat_bias([linear_bias(p, dtype) for p in projections]),
        out=merged_weight(attention.o_proj, dtype),
        gate_up=torch.cat([merged_weight(mlp.gate_proj, dtype), merged_weight(mlp.up_proj, dtype)]),
        down=merged_weight(mlp.down_proj, dtype),
        norm_attention=layer.input_layernorm.weight.data.to(dtype),
        norm_mlp=layer.post_attention_layernorm.weight.data.to(dtype),
        norm_q=None if norms[0] is None else norms[0].weight.data.to(dtype),
        norm_k=None if norms[1] is None else norms[1].weight.data.to(dtype),
    )


def find_unknown(model: nn.Module) -> str | None:
    """Say what of a model the decode loop does not know, and would leave out without a word."""
    config = model.config
    if config.model_type not in SUPPORTED:
        return f"knows {', '.join(SUPPORTED)} models, not {config.model_type!r}"
    if (rope_type := config.rope_parameters["rope_type"]) in DYNAMIC_ROPE:
        return f"knows no {rope_type!r} rotary embedding"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return f"knows no sliding window, and this model has one of {config.sliding_window} tokens"
    parts = ((name, layer.get_submodule(name)) for layer in model.model.layers for name in WITHOUT_BIAS)
    biased = next((name for name, part in parts if linear_bias(part, torch.float32) is not None), None)
    return biased and f"knows no bias of {biased}"


class Weights:
    """A folded copy of a causal language model (Llama, Qwen2 or Qwen3 architecture), with or without a PEFT adapter.

    Raises InputError for a model that has what the decode loop does not know.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = plain.config
        if unknown := find_unknown(plain):
            raise InputError(f"the rollout engine {unknown}: use --engine generate")
        self.dtype = dtype or plain.get_input_embeddings().weight.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.rotary = config.rms_norm_eps, plain.model.rotary_emb
        self.max_positions = config.max_position_embeddings
        self.model = plain
        self.layers = [read_layer(layer, self.dtype) for layer in plain.model.layers]
        self.embed, self.norm, self.head = self._ends()

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding and head (vocabulary, width), final norm (width,); they share the model's memory where the dtype is the same."""
        embed = self.model.get_input_embeddings().weight.data.to(self.dtype)
        tied = self.model.config.tie_word_embeddings
        head = embed if tied else merged_weight(self.model.get_output_embeddings(), self.dtype)
        return embed, self.model.model.norm.weight.data.to(self.dtype), head

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's present weights in place; call after every optimiser step."""
        for copy, layer in zip(self.layers, self.model.model.layers, strict=True):
            for old, new in zip(copy.tensors(), read_layer(layer, self.dtype).tensors(), strict=True):
                old.copy_(new)
        for old, new in zip((self.embed, self.norm, self.head), self._ends(), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (length, head_dim) of the model's own rotary embedding, scaling included.

        Computed in float32 from the module's attributes, because unsloth's replacement has the same ones but another call signature.
        """
        positions = torch.arange(length, device=self.embed.device).float()
        half = torch.outer(positions, self.rotary.inv_freq.to(positions))
        angles, scale = torch.cat((half, half), -1), self.rotary.attention_scaling
        return (angles.cos() * scale).to(self.dtype), (angles.sin() * scale).to(self.dtype)
