"""The rotary embedding against what the model's module itself says, and models with what the decode loop does not know."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sbtiny.errors import InputError
from sbtiny.models.load import add_lora
from sbtiny.rollout.weights import Weights

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
CHANGING = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    },
}


def llama(rope: dict[str, Any]) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope | {"rope_theta": 10_000.0}))


def qwen2(rope: dict[str, Any]) -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=rope | {"rope_theta": 1_000_000.0}))


def qwen3(rope: dict[str, Any]) -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, rope_parameters=rope | {"rope_theta": 1_000_000.0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("build", [llama, qwen2, qwen3])
def test_cos_and_sin_are_those_of_transformers(build: Any, rope: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(rope)
    theirs = model.model.rotary_emb(torch.zeros(1, dtype=dtype), torch.arange(500)[None])
    ours = Weights(model, dtype).rope(500)
    assert [found.dtype for found in ours] == [dtype, dtype]
    assert all(torch.equal(found, expected[0]) for found, expected in zip(ours, theirs, strict=True))


def test_scaling_is_seen() -> None:
    plain, *scaled = (Weights(llama(rope)).rope(100)[0] for rope in ROPES.values())
    assert not any(torch.equal(plain, found) for found in scaled)


def test_the_module_may_have_another_signature() -> None:
    class Replaced(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inv_freq, self.attention_scaling = inner.inv_freq, inner.attention_scaling

    model = llama(ROPES["llama3"])
    expected = Weights(model).rope(40)
    model.model.rotary_emb = Replaced(model.model.rotary_emb)
    assert all(torch.equal(a, b) for a, b in zip(Weights(model).rope(40), expected, strict=True))


@pytest.mark.parametrize("rope", CHANGING.values(), ids=CHANGING)
def test_a_rotary_embedding_that_changes_with_the_length_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"knows no '{rope['rope_type']}' rotary embedding"):
        Weights(llama(rope))


SLIDING = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("config", "build", "more", "reason"),
    [
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}, "no bias of self_attn.o_proj"),
        (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}, "no bias of mlp.gate_proj"),
        (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True}, "no bias of self_attn.o_proj"),
        (Qwen2Config, Qwen2ForCausalLM, SLIDING | {"max_window_layers": 0}, "no sliding window, and this model has one of 8 tokens"),
    ],
)
def test_what_would_be_left_out_without_a_word_is_refused(config: Any, build: Any, more: dict[str, Any], reason: str) -> None:
    model = build(config(**SHAPE, **more))
    for wrapped in (model, add_lora(model, rank=2)):
        with pytest.raises(InputError, match=f"{reason}: use --engine generate"):
            Weights(wrapped)


def test_a_window_that_no_layer_uses_is_none() -> None:
    assert Weights(Qwen2ForCausalLM(Qwen2Config(**SHAPE, **SLIDING, max_window_layers=1))).layers
