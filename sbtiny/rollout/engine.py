"""Continuous batching over fixed slots: the one decode loop of cold start, GRPO and evaluation.

Reasoning lengths are heavy-tailed, and a batch that waits for its longest row is idle most of the time. Here a finished slot takes the
next request in the same step, the cache is allocated once, and the prompt of a group is computed once and copied.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbtiny.errors import InputError
from sbtiny.rollout.batch import Batch
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.memory import slots_within
from sbtiny.rollout.sampling import Sampling, sample, uniforms
from sbtiny.rollout.weights import Layer, Weights


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of transformers; x (..., heads, head_dim), cos and sin (..., 1, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Engine:
    """Samples requests with a model's folded weights in at most `slots` rows of `capacity` tokens each.

    `pieces[i]` is the text of token i (see `token_pieces`), `stop_ids` the tokens that end an answer. `kv_gb` limits the cache in GiB
    (default: most of what is free when it is allocated); fewer slots are used where not all of them fit.
    """

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[str],
        stop_ids: frozenset[int],
        slots: int = 64,
        kv_gb: float | None = None,
    ) -> None:
        self.weights = Weights(model)
        self.pieces, self.slots, self.capacity, self.kv_gb = pieces, slots, 0, kv_gb
        self.rows, self.cache = 0, None
        self.stops = np.zeros(len(self.weights.embed), dtype=bool)
        if outside := [i for i in stop_ids if i >= len(self.stops)]:
            raise InputError(
                f"stop token {outside[0]} is outside the vocabulary of {len(self.stops)}: fix eos_token_id"
            )
        self.stops[list(stop_ids)] = True

    # ---- the model -----------------------------------------------------------------------------------------------------------------

    def _reserve(self, capacity: int) -> None:
        """Cache for `capacity` tokens a slot: (layers, 2, slots, kv heads, capacity, head_dim), zeros: unwritten memory is read masked."""
        if capacity <= self.capacity:
            return
        w, self.cache, self.capacity = self.weights, None, 0  # the old cache goes before the new one comes
        capacity = math.ceil(capacity / 64) * 64
        slot = len(w.layers) * 2 * w.kv_heads * capacity * w.head_dim * w.embed.element_size()
        self.rows = slots_within(slot, self.slots, self.kv_gb, w.embed.device)
        shape = (len(w.layers), 2, self.rows, w.kv_heads, capacity, w.head_dim)
        self.cache = torch.zeros(shape, dtype=w.dtype, device=w.embed.device)
        self.cos, self.sin = w.rope(capacity)
        self.capacity = capacity

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (rotated) and values of x (..., width): each (..., heads, head_dim)."""
        w = self.weights
        h = F.rms_norm(x, x.shape[-1:], layer.norm_attention, w.eps)
        fused = F.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, w.head_dim))
        turning, v = fused[..., : w.heads + w.kv_heads, :], fused[..., w.heads + w.kv_heads :, :]
        if layer.norm_q is not None:
            q, k = turning.split((w.heads, w.kv_heads), -2)
            norm = (w.head_dim,)
            turning = torch.cat(
                (F.rms_norm(q, norm, layer.norm_q, w.eps), F.rms_norm(k, norm, layer.norm_k, w.eps)), -2
            )
        q, k = rotate(turning, cos, sin).split((w.heads, w.kv_heads), -2)
        return q, k, v

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward, both with their residual."""
        x = x + F.linear(attended, layer.out)
        h = F.rms_norm(x, x.shape[-1:], layer.norm_mlp, self.weights.eps)
        gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> list[Tensor]:
        """Keys and values of each prompt but its last token: a list of (layers, 2, kv heads, length - 1, head_dim)."""
        w, longest = self.weights, max(len(p) for p in prompts) - 1
        if longest == 0:
            return [self.cache.new_zeros(len(w.layers), 2, w.kv_heads, 0, w.head_dim) for _ in prompts]
        # Right padding needs no mask: causality keeps it out of the real positions, and it is not copied.
        ids = torch.tensor([[*p[:-1], *[0] * (longest + 1 - len(p))] for p in prompts], device=w.embed.device)
        x, cos, sin = w.embed[ids], self.cos[:longest, None], self.sin[:longest, None]
        kept = []
        for layer in w.layers:
            q, k, v = (t.transpose(1, 2) for t in self._project(layer, x, cos, sin))
            kept.append(torch.stack((k, v)))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._finish(layer, x, y.transpose(1, 2).flatten(2))
        stacked = torch.stack(kept)
        return [stacked[:, :, i, :, : len(p) - 1].clone() for i, p in enumerate(prompts)]

    def _decode(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """One token for each of the first n slots: logits (n, vocabulary). tokens, positions (n,); span > every position."""
        w, n = self.weights, len(tokens)
        rows = torch.arange(n, device=tokens.device)
        x, cos, sin = w.embed[tokens], self.cos[positions][:, None], self.sin[positions][:, None]
        hidden = torch.arange(span, device=tokens.device) > positions[:, None]
        mask = torch.zeros(n, 1, 1, span, dtype=w.dtype, device=x.device).masked_fill_(hidden[:, None, None], -math.inf)
        for layer, (keys, values) in zip(w.layers, self.cache, strict=True):
            q, k, v = self._project(layer, x, cos, sin)
            keys[rows, :, positions], values[rows, :, positions] = k, v
            q = (
                q.view(n, w.kv_heads, -1, w.head_dim) * w.head_dim**-0.5
            )  # grouped queries share a key head: no copy of the cache
            scores = (q @ keys[:n, :, :span].transpose(-1, -2)).add_(mask).softmax(-1)
            x = self._finish(layer, x, (scores @ values[:n, :, :span]).flatten(1))
        return F.linear(F.rms_norm(x, x.shape[-1:], w.norm, w.eps), w.head)

    # ---- the loop ------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], sampling: Sampling, on_episode: Callable[[int, Episode], None] | None = None
    ) -> list[Episode]:
        """Sample every request; the answer keeps their order. `on_episode(index, episode)` is called as each one ends.

        Raises InputError for an empty prompt or one that leaves no room within the model's positions.
        """
        self._check(requests)
        self._reserve(max(len(r.prompt_ids) + r.max_tokens for r in requests))
        batch = Batch(self, requests, on_episode)
        while batch.refill():
            n = batch.active
            logits = self._decode(*batch.inputs())
            draws = uniforms(batch.seeds[:n], batch.counts[:n].astype(np.uint64))
            tokens, logprobs = sample(logits, sampling, draws)
            batch.accept(tokens.cpu().numpy(), None if logprobs is None else logprobs.cpu().numpy())
        return [episode for episode in batch.episodes if episode is not None]

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.prompt_ids:
                raise InputError("an empty prompt: the chat template rendered nothing")
            if request.max_tokens < 1:
                raise InputError(f"a request for {request.max_tokens} tokens: ask for 1 or more")
            if len(request.prompt_ids) + request.max_tokens > self.weights.max_positions:
                raise InputError(
                    f"a prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} to write exceed the model's "
                    f"{self.weights.max_positions} positions: lower --max-tokens"
                )
        for token in {token for r in requests if r.limits for token in r.limits.wrap_up}:
            if not 0 <= token < len(self.stops) or self.stops[token]:
                raise InputError(f"token {token} of the wrap-up text is a stop token or outside the vocabulary: reword it")


def token_pieces(tokenizer: object, size: int) -> list[str]:
    """The text of every token id below `size`, special tokens included; bytes that are no whole character show as U+FFFD."""
    return [tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in range(size)]
