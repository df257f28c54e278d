"""Truncation of the distribution: the likeliest tokens first, the whole vocabulary only where they do not reach."""

import pytest
import torch
from torch import Tensor

from sbtiny.rollout.sampling import TOP_TOKENS, Sampling, truncate


def by_sorting(probs: Tensor, sampling: Sampling) -> Tensor:
    """Top-k and top-p as they are defined, over the sorted vocabulary."""
    ordered, index = probs.sort(-1, descending=True)
    keep = ordered.cumsum(-1) - ordered < sampling.top_p * probs.sum(-1, keepdim=True)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    return torch.zeros_like(probs).scatter(-1, index, ordered.where(keep, 0.0))


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.95), Sampling(top_k=50), Sampling(top_k=TOP_TOKENS + 40), Sampling(top_p=0.6, top_k=300)]
)
@pytest.mark.parametrize("vocabulary", [40, TOP_TOKENS, 4096])
def test_truncation_is_that_of_the_sorted_vocabulary(sampling: Sampling, vocabulary: int) -> None:
    peaked = torch.tensor([[0.5], [2.0], [6.0]])  # the first row's nucleus is far wider than the head, the last one's a few tokens
    probs = (torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)).double() * peaked).softmax(-1)
    assert torch.equal(truncate(probs, sampling), by_sorting(probs, sampling))
