"""Attention in blocks on a CPU: transformers' own results, forward and backward, in every precision of training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sbtiny import runs
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.config import GrpoSettings, Settings, SftSettings
from sbtiny.grpo.run import run_grpo
from sbtiny.tasks import arithmetic
from sbtiny.training import attention, folded_lora

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_padding_is_finite_whatever_its_scores(dtype: torch.dtype) -> None:
    query, key = torch.full((1, 2, 5, 8), 4.0, dtype=dtype), torch.full((1, 2, 5, 8), -4.0, dtype=dtype)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., :2] = False  # two of padding on the left, which see nothing
    found, _ = attention.attend(nn.Module(), query, key, torch.randn(1, 2, 5, 8, dtype=dtype), mask, scaling=1.0)
    assert torch.isfinite(found).all()


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
def test_both_trainers_use_it_on_a_cpu_and_fold_small_adapters(policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, folded = [], []
    monkeypatch.setattr(attention, "block_bias", lambda *how, of=attention.block_bias: used.append(1) or of(*how))
    monkeypatch.setattr(folded_lora, "foldable_adapter", lambda layer, of=folded_lora.foldable_adapter: folded.append(1) or of(layer))
    rows = [make_row(policy, q, f"\\boxed{{{q.answer}}}") for q in arithmetic.generate_questions("train", 4, seed=5)]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = Settings(
        four_bit=False,
        sft=SftSettings(rows=str(tmp_path / "rows.jsonl"), steps=1),
        grpo=GrpoSettings(steps=1, prompts_per_step=1, num_generations=4, max_tokens=16, limit=2),
    )
    start = run_sft(settings, tmp_path / "sft")
    by_sft = len(used), len(folded)
    run_grpo(settings, start, tmp_path / "grpo", force=True)
    assert 0 < by_sft[0] < len(used)
    assert 0 < by_sft[1] < len(folded)
