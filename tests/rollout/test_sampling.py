"""Truncation of the distribution: the likeliest tokens first, the whole vocabulary only where they do not reach."""

import pytest
import torch
from torch import Tensor

from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.sampling import TOP_TOKENS, draw_tokens


def by_sorting(probs: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p of what it leaves, as they are defined, over the sorted vocabulary."""
    ordered, index = probs.sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
    keep = ordered.cumsum(-1) - ordered < sampling.top_p * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, index, ordered.where(keep, 0.0))


def by_inversion(probs: Tensor, draws: Tensor) -> Tensor:
    """The first token at which the sum over the vocabulary exceeds the draw."""
    total = probs.cumsum(-1)
    return (total <= draws * total[:, -1:]).sum(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.95),
        Sampling(top_k=50),
        Sampling(top_k=TOP_TOKENS + 40),
        Sampling(top_p=0.6, top_k=300),
        Sampling(),
        Sampling(min_p=0.05),
    ],
)
@pytest.mark.parametrize("vocabulary", [40, TOP_TOKENS, 4096])
def test_a_draw_means_the_token_of_the_whole_vocabulary_in_order(sampling: Sampling, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    peaked = torch.tensor([[0.5], [2.0], [6.0]])  # the first row's nucleus is far wider than the head, the last one's a few tokens
    probs = (torch.randn(3, vocabulary, generator=generator).double() * peaked).softmax(-1)
    left = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    left = by_sorting(left, sampling) if sampling.top_k or sampling.top_p < 1 else left
    for draws in torch.rand(200, 3, 1, generator=generator, dtype=torch.float64):
        assert torch.equal(draw_tokens(probs, sampling, draws), by_inversion(left, draws))


@pytest.mark.parametrize(("top_p", "drawn"), [(0.5, {1}), (0.58, {1, 2}), (1.0, {1, 2})])
def test_top_p_is_a_share_of_what_top_k_leaves(top_p: float, drawn: set[int]) -> None:
    probs = torch.tensor([[0.2, 0.4, 0.3, 0.1]])  # top-k leaves 0.4 / 0.7 = 0.571 and the rest
    draws = torch.linspace(0, 0.99, 50)[:, None]
    assert set(draw_tokens(probs.expand(50, -1), Sampling(top_p=top_p, top_k=2), draws).tolist()) == drawn
