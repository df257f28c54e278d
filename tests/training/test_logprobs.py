"""Log-probabilities in chunks are those of the whole, forwards and backwards, and no logits are kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbtiny.training import logprobs

WIDTH, WORDS = 16, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", 8)
    monkeypatch.setattr(logprobs, "HEAD_BLOCK", 3 * WORDS)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=draw).to(dtype)
    return hidden, weight, torch.randint(WORDS, (tokens,), generator=draw)


def whole_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, cap: float | None, scale: float) -> Tensor:
    logits = F.linear(hidden, weight, bias).float() * scale
    return ((logits if cap is None else cap * torch.tanh(logits / cap)) / temperature).log_softmax(-1)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 24, 30])
@pytest.mark.parametrize(("temperature", "cap", "scale"), [(1.0, None, 1.0), (0.7, None, 0.25), (1.0, 3.0, 1.0), (0.7, 3.0, 0.5)])
def test_chunks_give_what_the_whole_gives(tokens: int, temperature: float, cap: float | None, scale: float) -> None:
    hidden, weight, targets = inputs(tokens)
    bias = torch.linspace(-1, 1, WORDS)
    found, entropy, *_, top = logprobs.ChunkedLogProbs.apply(
        hidden, weight, bias, targets, temperature, 0, cap, scale, ("log_probs", "entropy", "is_top1")
    )
    whole = whole_logprobs(hidden, weight, bias, temperature, cap, scale)
    wanted = whole.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1).detach())
    assert top.tolist() == (whole.argmax(-1) == targets).tolist()
    each = torch.linspace(-1, 2, tokens)  # what a loss hands back differs by token
    (ours,), (theirs,) = (torch.autograd.grad((x * each).sum(), hidden) for x in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_under_autocast_the_products_are_in_bfloat16_and_the_sums_are_not(stored: torch.dtype) -> None:
    hidden, weight, targets = inputs(20, stored)
    with torch.autocast("cpu", torch.bfloat16):
        found, *_ = logprobs.ChunkedLogProbs.apply(hidden, weight, None, targets, 0.7, 0)
    wanted = whole_logprobs(hidden.bfloat16(), weight.bfloat16(), None, 0.7, None, 1.0).gather(-1, targets[:, None])[:, 0]
    assert torch.equal(found, wanted)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), hidden) for x in (found, wanted))
    assert ours.dtype == stored
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    held: list[int] = []

    def saved(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    hidden, weight, targets = inputs(64)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        logprobs.ChunkedLogProbs.apply(hidden, weight, None, targets, 1.0, 0)
    assert held == [64 * WIDTH]


def test_an_output_embedding_that_is_trained_is_refused() -> None:
    hidden, weight, targets = inputs(4)
    with pytest.raises(NotImplementedError, match="output embedding"):
        logprobs.ChunkedLogProbs.apply(hidden, weight.requires_grad_(), None, targets, 1.0, 0)
