"""LoRA layers folded on a CPU: peft's own results and gradients, and peft's own forward for whatever is no plain small adapter."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sbtiny.training.folded_lora import fold_small_adapters, foldable_adapter

IDS = torch.arange(72).view(3, 24) % 50 + 2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def build_model(fold: bool, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).to(dtype)
    model = get_peft_model(
        base, LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    if fold:
        fold_small_adapters(model)
    return model.train()


def layers(model: PeftModel) -> dict[str, Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def folded(model: PeftModel) -> set[str]:
    return {name.rpartition(".")[2] for name, layer in layers(model).items() if "forward" in vars(layer)}


def run(model: PeftModel, autocast: bool = False) -> list[Tensor]:
    """The log-probabilities of the next tokens and the gradients of the adapter."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    logprobs = logits.float().log_softmax(-1)
    logprobs[..., 7].sum().backward()
    return [logprobs.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)]


@pytest.mark.parametrize(("autocast", "near"), [(False, 1e-4), (True, 0.1)])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_it_computes_and_learns_what_peft_does(options: dict[str, Any], autocast: bool, near: float) -> None:
    ours, theirs = build_model(True, **options), build_model(False, **options)
    assert len(folded(ours)) == 7
    assert not folded(theirs)
    for mine, other in zip(run(ours, autocast), run(theirs, autocast), strict=True):
        assert mine.dtype == other.dtype == torch.float32
        assert (mine - other).norm() <= near * other.norm()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True, "target_modules": ATTENTION}])
def test_what_is_no_product_is_computed_by_peft(options: dict[str, Any]) -> None:
    ours, theirs = build_model(True, **options), build_model(False, **options)
    assert not any(foldable_adapter(layer) for layer in layers(ours).values())
    assert all(torch.equal(mine, other) for mine, other in zip(run(ours), run(theirs), strict=True))


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


def test_a_base_with_a_forward_of_its_own_keeps_it() -> None:
    model = get_peft_model(nn.Sequential(Squared(8, 8), nn.Linear(8, 8)), LoraConfig(r=8, target_modules=["0", "1"]))
    fold_small_adapters(model)
    assert folded(model) == {"1"}


def test_a_small_change_is_not_lost_beside_rounded_weights() -> None:
    """In bfloat16 a weight's steps are larger than the adapter's change of it."""
    changes = []
    for autocast in (False, True):
        model = build_model(True)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data *= 0.01
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            told = model(input_ids=IDS).logits.float()
            with model.disable_adapter():
                changes.append(told - model(input_ids=IDS).logits.float())
    exact, rounded = changes
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.95


def test_decoding_is_computed_by_peft() -> None:
    ours, theirs = (build_model(fold).eval() for fold in (True, False))
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_a_copy_has_an_adapter_of_its_own() -> None:
    model = build_model(True)
    fold_small_adapters(model)  # an attempt that ran out of memory is begun again
    twin, before = copy.deepcopy(model), model(input_ids=IDS).logits
    for name, weight in twin.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    assert torch.allclose(twin(input_ids=IDS).logits, base, atol=1e-5)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_base_of_another_precision_is_computed_by_peft() -> None:
    ours, theirs = (build_model(fold, torch.bfloat16) for fold in (True, False))
    assert all(torch.equal(mine, other) for mine, other in zip(run(ours, True), run(theirs, True), strict=True))


def test_the_active_adapter_counts() -> None:
    model = build_model(True)
    model.add_adapter("ref", LoraConfig(r=8, target_modules="all-linear"))  # its B is 0: it changes nothing
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        model.set_adapter("ref")
        initial = model(input_ids=IDS).logits
        model.set_adapter("default")
        again = model(input_ids=IDS).logits
        model.merge_adapter()
        merged = model(input_ids=IDS).logits
    assert (trained - base).abs().max() > 0.1
    assert torch.allclose(initial, base, atol=1e-5)
    assert torch.equal(again, trained)
    assert torch.allclose(merged, trained, atol=1e-4)


def test_a_wide_layer_stays_as_it_is() -> None:
    assert folded(build_model(True, r=2)) == set()
    assert folded(build_model(True, r=2, rank_pattern={"k_proj": 16})) == {"k_proj"}
