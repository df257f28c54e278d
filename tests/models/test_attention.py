"""Attention by plain products: transformers' own results, forward and backward, whichever way a row takes."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sbtiny.models import attention
from sbtiny.models.load import load_model

PADDED = torch.ones(3, 24, dtype=torch.long)
PADDED[0, 17:] = PADDED[1, :5] = 0  # right and left
IDS = torch.arange(72).view(3, 24) % 50 + 2
CONFIG = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits of real positions, and the gradient of the first layer's queries by a sum of log-probabilities."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_key_value_heads=2)).to(dtype)
    model.set_attn_implementation(kind)
    logits = model(input_ids=IDS, attention_mask=PADDED).logits[PADDED.bool()].float()
    logits.log_softmax(-1)[:, 7].sum().backward()
    return logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.float()


@pytest.mark.parametrize("most", [attention.MOST_SCORES, 0], ids=["products", "torch's kernel"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_it_computes_what_transformers_does(most: int, dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    for ours, theirs in zip(run(attention.register(), dtype), run("eager", dtype), strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= near * theirs.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels of its own")
def test_a_model_on_a_cpu_is_loaded_with_it() -> None:
    assert load_model("tiny")[0].config._attn_implementation == attention.NAME
