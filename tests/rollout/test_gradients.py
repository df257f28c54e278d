"""Rollouts leave training alone: a train step after one has the gradients it would have had without it."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from sbtiny.models.load import add_lora, load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic

Trained = tuple[Policy, torch.Tensor]


@pytest.fixture(scope="module", params=["float32", "nf4"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """The bundled model with a fresh adapter that computes in float32, and one row of token ids."""
    model, tokenizer = load_model("tiny", four_bit=request.param == "nf4", dtype="float32")
    torch.manual_seed(0)
    model = add_lora(model, rank=4)
    ids = prompt_ids(tokenizer, arithmetic.generate_questions("val", 1)[0].question)
    return build_policy(model, tokenizer, slots=4), torch.tensor([ids])


def adapter(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_step(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a step, which is taken."""
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in adapter(model).items()}
    for name, parameter in adapter(model).items():
        parameter.data -= 0.1 * found[name]
    return found


def two_steps(trained: Trained, between: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Gradients of the second of two train steps; the adapter is put back afterwards."""
    policy, ids = trained
    start = {name: p.detach().clone() for name, p in adapter(policy.model).items()}
    train_step(policy.model, ids)
    between()
    found = train_step(policy.model, ids)
    for name, parameter in adapter(policy.model).items():
        parameter.data.copy_(start[name])
    return found


@pytest.mark.parametrize("engine", ["ours", "generate"])
def test_a_rollout_between_two_train_steps_changes_no_gradient(trained: Trained, engine: str) -> None:
    model, tokenizer = trained[0].model, trained[0].tokenizer
    policy = build_policy(model, tokenizer, slots=4, engine=engine)
    asked = [policy.request(q.question, 12 + 3 * (i % 3), seed=i) for i, q in enumerate(arithmetic.generate_questions("val", 10))]

    def rollout() -> None:
        assert model.training
        policy.refresh()
        texts = [e.text for e in policy.sample(asked, Sampling(logprobs=True))]
        assert len(set(texts)) > 1
        assert model.training
        with model.disable_adapter():  # as the lengths of the initial model are taken
            policy.refresh()
            policy.sample(asked[:3], Sampling(0))
        policy.refresh()

    expected, found = two_steps(trained, lambda: None), two_steps(trained, rollout)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)
