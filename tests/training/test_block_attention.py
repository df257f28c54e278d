"""Attention in blocks on a CPU: transformers' own results, forward and backward, in every precision of training."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sbtiny.training import attention

IDS = torch.arange(72).view(3, 24) % 50 + 2
WHOLE = torch.ones(3, 24, dtype=torch.long)
PADDED = WHOLE.clone()
PADDED[0, 17:] = PADDED[1, :5] = 0  # right and left


def build_model(kind: str, kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=kv_heads))
    attention.register()
    model.set_attn_implementation(kind)
    return model


def run(model: LlamaForCausalLM, seen: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The logits of real tokens, and the gradient of the first layer's queries by a sum of log-probabilities."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS, attention_mask=seen).logits[seen.bool()].float()
    logits.log_softmax(-1)[:, 7].sum().backward()
    return logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.float()


@pytest.mark.parametrize("seen", [WHOLE, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("block", [128, 7], ids=["one block", "blocks"])
@pytest.mark.parametrize(("dtype", "autocast", "near"), [("float32", False, 1e-5), ("bfloat16", False, 0.05), ("float32", True, 0.05)])
def test_it_computes_what_transformers_does(
    seen: Tensor, block: int, dtype: str, autocast: bool, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    ours, theirs = (run(build_model(kind).to(getattr(torch, dtype)), seen, autocast) for kind in (attention.NAME, "eager"))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - other).abs().max() <= near * other.abs().max()


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_heads_may_share_all_keys_or_none(kv_heads: int) -> None:
    ours, theirs = (run(build_model(kind, kv_heads), PADDED) for kind in (attention.NAME, "eager"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_long_rows_go_to_the_kernel_that_keeps_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 3 * 4 * 24 * 24
    monkeypatch.setattr(attention, "block_bias", lambda *_: pytest.fail("the scores were kept"))
    monkeypatch.setattr(attention, "MOST_SCORES", most - 1)
    torch.testing.assert_close(run(build_model(attention.NAME), PADDED), run(build_model("sdpa"), PADDED))
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    with pytest.raises(pytest.fail.Exception, match="scores were kept"):
        run(build_model(attention.NAME), PADDED)


def test_values_may_have_a_width_of_their_own() -> None:
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    ours, _ = attention.attend(nn.Module(), query, key, value, None, scaling=0.3)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}, {"scaling": None}])
def test_more_than_causal_attention_is_not_plain(more: dict) -> None:
    assert attention.is_plain(nn.Module(), None, {"scaling": 1.0, "dropout": 0.0, "softcap": None})
    assert not attention.is_plain(nn.Module(), None, {"scaling": 1.0} | more)
    assert not attention.is_plain(nn.Module(), torch.zeros(1, 1, 2, 2), {"scaling": 1.0})


def test_a_cache_is_read_in_full() -> None:
    asked = {"inputs": IDS, "attention_mask": WHOLE, "max_new_tokens": 6, "do_sample": False}
    ours, theirs = (build_model(kind).generate(**asked) for kind in (attention.NAME, "sdpa"))
    assert ours.tolist() == theirs.tolist()


def test_what_is_not_plain_causal_attention_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "block_bias", lambda *_: pytest.fail("dropout was lost"))
    model = build_model(attention.NAME)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    run(model.train(), WHOLE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels of its own")
def test_training_uses_it_on_a_cpu() -> None:
    model = build_model("sdpa")
    attention.use_block_attention(model)
    assert model.config._attn_implementation == attention.NAME
