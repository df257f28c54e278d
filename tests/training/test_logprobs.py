"""Log-probabilities in chunks are those of the whole, forwards and backwards, with no more logits held than a chunk's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbtiny.training import logprobs

WIDTH, WORDS = 16, 50


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=draw, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, generator=draw, requires_grad=True)
    return hidden, weight, torch.randint(WORDS, (tokens,), generator=draw)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 24, 30])
def test_chunks_give_what_the_whole_gives(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", 8)
    hidden, weight, targets = inputs(tokens)
    found, entropy, *_, top = logprobs.ChunkedLogProbs.apply(
        hidden, weight, None, targets, 0.7, 0, outputs=("log_probs", "entropy", "is_top1")
    )
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    whole = (F.linear(hidden, weight) / 0.7).log_softmax(-1)
    wanted = whole.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1).detach())
    assert top.bool().tolist() == (whole.argmax(-1) == targets).tolist()
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_more_logits_are_held_than_a_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", 8)
    held: list[int] = []

    def saved(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    hidden, weight, targets = inputs(64)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        logprobs.ChunkedLogProbs.apply(hidden, weight, None, targets, 1.0, 0)
    assert max(held) < 64 * WORDS  # of all tokens at once there are none
    assert sum(size for size in held if size >= 8 * WORDS and size != weight.numel()) == 0
