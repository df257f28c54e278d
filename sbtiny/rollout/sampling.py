"""From logits to tokens: one uniform draw decides each token, so a request's text depends on its seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sbtiny.errors import InputError

TOP_TOKENS = 256  # likeliest tokens, tried first: top-p seldom needs more, and sorting a vocabulary of 150,000 takes 20 times as long


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is below 0: use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not in (0, 1]: use 1 to switch it off")
        if self.top_k < 0 or not 0 <= self.min_p < 1:
            raise InputError(f"top_k {self.top_k} must be 0 or more and min_p {self.min_p} in [0, 1)")


def counter_uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A draw in [0, 1) for each (seed, position), both uint64: the splitmix64 finaliser over a counter.

    It has no state, so neither the batch nor the order of requests can change a draw.
    """
    with np.errstate(over="ignore"):
        z = seeds * np.uint64(0x9E3779B97F4A7C15) + (positions + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def sample_tokens(logits: Tensor, sampling: Sampling, draws: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Sample tokens (rows,) by the inverse of the cumulative distribution.

    logits (rows, vocabulary) in any float type; draws (rows,) uniform in [0, 1). With `sampling.logprobs` also returns their
    log-probabilities under the temperature alone, which TRL compares with.
    """
    if sampling.temperature == 0:
        logits = logits.float()
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] if sampling.logprobs else None
    scaled = logits.to(torch.float32, copy=True).div_(sampling.temperature)
    probs = torch.softmax(scaled, -1, out=scaled)  # in place: a new buffer for a vocabulary of 150,000 takes as long as the sums
    tokens = draw_tokens(probs, sampling, torch.from_numpy(draws).to(probs.device)[:, None])
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log() if sampling.logprobs else None


def draw_tokens(probs: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Draw a token for each row (rows,) from what top-k, top-p and min-p leave. probs (rows, vocabulary), draws (rows, 1)."""
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    if not sampling.top_k and sampling.top_p == 1:
        return invert(probs, draws)
    tokens, complete = draw_top(probs, min(TOP_TOKENS, probs.shape[-1]), sampling, draws)
    if not complete.all():
        left = ~complete
        tokens[left] = draw_top(probs[left], probs.shape[-1], sampling, draws[left])[0]
    return tokens


def draw_top(probs: Tensor, count: int, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from what top-k and top-p leave of each row's `count` likeliest tokens. Also returns whether these were enough (rows,).

    They are summed in the order of the vocabulary, so that a draw means the same token whatever is left out.
    """
    ordered, index = probs.topk(count) if count < probs.shape[-1] else probs.sort(-1, descending=True)
    keep = ordered.cumsum(-1) - ordered < sampling.top_p * probs.sum(-1, keepdim=True)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    index, place = index.sort(-1)
    chosen = invert(ordered.where(keep, 0.0).gather(-1, place), draws)
    return index.gather(-1, chosen[:, None])[:, 0], ~keep[:, -1] | (count == probs.shape[-1])


def invert(probs: Tensor, draws: Tensor) -> Tensor:
    """The place (rows,) at which the sum of each row's probabilities exceeds its draw of their total."""
    total = probs.cumsum(-1)
    return torch.searchsorted(total, draws * total[:, -1:], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def sample_rows(logits: Tensor, samplings: Sequence[Sampling], draws: np.ndarray) -> tuple[list[int], list[float | None]]:
    """Sample a token for each row by its own sampling: tokens, and log-probabilities where they are asked for.

    Rows of the same sampling are sampled together.
    """
    if all(s is samplings[0] for s in samplings):
        return read_rows(*sample_tokens(logits, samplings[0], draws))
    tokens, values = [0] * len(samplings), [None] * len(samplings)
    for sampling in set(samplings):
        rows = [i for i, s in enumerate(samplings) if s == sampling]
        for i, token, value in zip(rows, *read_rows(*sample_tokens(logits[rows], sampling, draws[rows])), strict=True):
            tokens[i], values[i] = token, value
    return tokens, values


def read_rows(tokens: Tensor, logprobs: Tensor | None) -> tuple[list[int], list[float | None]]:
    return tokens.tolist(), [None] * len(tokens) if logprobs is None else logprobs.tolist()
