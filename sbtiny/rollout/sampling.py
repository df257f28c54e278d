"""From logits to tokens: one uniform draw decides each token, so a request's text depends on its seed alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sbtiny.budget.protocol import tag_prefix_length
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.limit_enforcer import LimitEnforcer

TOP_TOKENS = 256  # likeliest tokens, tried first: top-p seldom needs more, and sorting a vocabulary of 150,000 takes 20 times as long
TAG_START = 3  # characters of a closing tag from which it is masked: "</" begins many other things


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
    tokens, complete = draw_top(probs, min(max(TOP_TOKENS, sampling.top_k + 1), probs.shape[-1]), sampling, draws)
    if not complete.all():
        left = ~complete
        tokens[left] = draw_top(probs[left], probs.shape[-1], sampling, draws[left])[0]
    return tokens


def draw_top(probs: Tensor, count: int, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from what top-k, then top-p leave of each row's `count` likeliest tokens. Also returns whether these were enough (rows,).

    `count` is above `top_k`, as top-p is a share of what top-k leaves. They are summed in the order of the vocabulary, so that a draw
    means the same token whatever is left out.
    """
    ordered, index = probs.topk(count) if count < probs.shape[-1] else probs.sort(-1, descending=True)
    total = (ordered[:, : sampling.top_k] if sampling.top_k else probs).sum(-1, keepdim=True)
    keep = ordered.cumsum(-1) - ordered < sampling.top_p * total
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


class TagMask:
    """Masks the tokens that would write a tag. `pieces[i]` is the text of token i."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces
        self.found: dict[tuple[str, int], Tensor] = {}

    def tokens(self, tag: str, matched: int) -> Tensor:
        """The tokens that complete the tag, or get as far as TAG_START, where `matched` of its characters stand."""
        if (tag, matched) not in self.found:
            able = ((i, p) for i, p in enumerate(self.pieces) if "<" in p or p[:1] == tag[matched])  # few of many thousands
            texts = ((i, tag[:matched] + p) for i, p in able)
            ids = [i for i, text in texts if tag in text or tag_prefix_length(text, tag) >= TAG_START]
            self.found[tag, matched] = torch.tensor(ids, dtype=torch.int64)
        return self.found[tag, matched]

    def masked_tokens(self, enforcer: LimitEnforcer | None, begun: bool = True) -> list[int]:
        """The tokens that would go on with a second closing tag; without `begun` those that would begin one."""
        if enforcer is None or (masked := enforcer.masked_tag) is None:
            return []
        tag, matched = masked
        return self.tokens(tag, matched if begun else 0).tolist()

    def apply(self, logits: Tensor, enforcers: Sequence[LimitEnforcer | None]) -> None:
        """Mask, in place, each row's tag; logits (rows, vocabulary)."""
        for row, enforcer in enumerate(enforcers):
            if enforcer is not None and (tag := enforcer.masked_tag):
                logits[row, self.tokens(*tag).to(logits.device)] = -torch.inf
