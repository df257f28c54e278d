"""Continuous batching over fixed slots: the one decode loop of cold start, GRPO and evaluation.

Lengths are heavy-tailed, so a batch that waits for its longest row is idle most of the time. Here a finished slot takes the next request
in the same step. The cache is allocated once. The prompt of a group is computed once and copied.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbtiny.models import shapes
from sbtiny.rollout.cuda_graph import CudaGraphs
from sbtiny.rollout.decode_engine import DecodeEngine, stop_mask
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.memory import fit_slots
from sbtiny.rollout.sampling import TagMask, sample_rows
from sbtiny.rollout.scheduler import Scheduler, block_size
from sbtiny.rollout.session import Session, Ticket, check_capacity, uniform_draws
from sbtiny.rollout.weights import Layer, Weights


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of transformers; x (..., heads, head_dim), cos and sin (..., 1, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend_to_cache(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention over the first places of the cache, as many as the mask has: q (n, kv heads, queries, head_dim) -> the same shape."""
    span = mask.shape[-1]
    return (q @ keys[:, :, :span].transpose(-1, -2)).add_(mask).softmax(-1) @ values[:, :, :span]


class Engine(DecodeEngine):
    """Samples requests with a model's folded weights in at most `slots` rows of `capacity` tokens each.

    `pieces[i]` is the text of token i (see `token_pieces`), `stop_ids` the tokens that end an answer. `kv_cache_gib` limits the cache in
    GiB (default: most of the memory free at allocation). Where not all slots fit there are fewer, with a line on stderr.
    """

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[str],
        stop_ids: frozenset[int],
        slots: int = 64,
        kv_cache_gib: float | None = None,
    ) -> None:
        self.weights = Weights(model)
        self.pieces, self.slots, self.capacity, self.kv_cache_gib = pieces, slots, 0, kv_cache_gib
        self.rows, self.spare_bytes, self.cache, self.graphs, self.sessions = 0, 0, None, None, 0
        self.stops, self.max_positions = stop_mask(stop_ids, len(self.weights.embed)), self.weights.max_positions
        self.tag_mask = TagMask(pieces)

    def refresh(self) -> None:
        self.weights.refresh()

    # ---- the model -----------------------------------------------------------------------------------------------------------------

    def slot_bytes(self, capacity: int) -> int:
        """Bytes of the keys and values of one sequence."""
        w = self.weights
        return shapes.slot_bytes(len(w.layers), w.kv_heads * w.head_dim, capacity, w.embed.element_size())

    def check_room(self, tokens: int) -> None:
        fit_slots(self.slot_bytes(tokens), 1, self.kv_cache_gib, self.weights.embed.device)

    def _reserve(self, capacity: int, keeps_states: bool) -> None:
        """Allocate the cache (layers, 2, slots, kv heads, capacity, head_dim), in zeros because masked positions are read too."""
        if capacity <= self.capacity:
            return
        w, self.capacity = self.weights, 0
        self.cache = self.graphs = None  # free the old memory before the new allocation
        capacity = math.ceil(capacity / 64) * 64
        slot = self.slot_bytes(capacity)
        self.rows, self.spare_bytes = fit_slots(slot, self.slots, self.kv_cache_gib, w.embed.device, keeps_states)
        shape = (len(w.layers), 2, self.rows, w.kv_heads, capacity, w.head_dim)
        self.cache = torch.zeros(shape, dtype=w.dtype, device=w.embed.device)
        self.cos, self.sin = w.rope(capacity)
        self.capacity = capacity
        if self.cache.device.type == "cuda":
            self.graphs = CudaGraphs(self._decode, self.rows, capacity, self.cache.device)

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (rotated) and values of x (..., width): each (..., heads, head_dim)."""
        w = self.weights
        h = F.rms_norm(x, x.shape[-1:], layer.norm_attention, w.eps)
        fused = F.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, w.head_dim))
        qk, v = fused[..., : w.heads + w.kv_heads, :], fused[..., w.heads + w.kv_heads :, :]
        if layer.norm_q is not None:
            q, k = qk.split((w.heads, w.kv_heads), -2)
            norm = (w.head_dim,)
            qk = torch.cat((F.rms_norm(q, norm, layer.norm_q, w.eps), F.rms_norm(k, norm, layer.norm_k, w.eps)), -2)
        q, k = apply_rotary(qk, cos, sin).split((w.heads, w.kv_heads), -2)
        return q, k, v

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward, both with their residual."""
        x = x + F.linear(attended, layer.out)
        h = F.rms_norm(x, x.shape[-1:], layer.norm_mlp, self.weights.eps)
        gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _prefill(self, prompts: list[tuple[int, ...]], beginning: Tensor | None = None) -> list[Tensor]:
        """Keys and values of each prompt without its last token: a list of (layers, 2, kv heads, length - 1, head_dim).

        `beginning`: those of the first tokens of a single prompt, which are not computed again.
        """
        w, start = self.weights, 0 if beginning is None else beginning.shape[-2]
        longest = max(len(p) for p in prompts) - 1 - start
        if longest == 0:
            empty = self.cache.new_zeros(len(w.layers), 2, w.kv_heads, 0, w.head_dim)
            return [empty if beginning is None else beginning.clone() for _ in prompts]  # it may be a view of a slot that others take
        # Only attention is computed of padded rows: being causal, it hides the padding on the right from the real positions.
        counts, shape = torch.tensor([len(p) - 1 - start for p in prompts]), (len(prompts), longest)
        places = (torch.arange(longest) < counts[:, None]).flatten().nonzero()[:, 0].to(w.embed.device)
        ids = torch.tensor([token for p in prompts for token in p[start:-1]], device=w.embed.device)
        positions = start + places % longest
        x, cos, sin = w.embed[ids], self.cos[positions, None], self.sin[positions, None]
        mask = None if beginning is None else torch.ones(longest, start + longest, dtype=torch.bool, device=x.device).tril(start)
        layer_states = []
        for i, layer in enumerate(w.layers):
            packed = self._project(layer, x, cos, sin)
            padded = (t.new_zeros(math.prod(shape), *t.shape[1:]).index_copy_(0, places, t) for t in packed)
            q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in padded)
            if beginning is not None:
                k, v = (torch.cat((old[None], new), -2) for old, new in zip(beginning[i], (k, v), strict=True))
            layer_states.append(torch.stack((k, v)))
            if layer is w.layers[-1]:  # nothing comes after its keys and values
                break
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            x = self._finish(layer, x, y.transpose(1, 2).flatten(0, 1)[places].flatten(1))
        stacked = torch.stack(layer_states)
        return [stacked[:, :, i, :, : len(p) - 1].clone() for i, p in enumerate(prompts)]

    def _decode(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """One token for each of the first n slots: logits (n, vocabulary). tokens, positions (n,); span > every position."""
        w, n = self.weights, len(tokens)
        rows = torch.arange(n, device=tokens.device)
        x, cos, sin = w.embed[tokens], self.cos[positions][:, None], self.sin[positions][:, None]
        blocks = self._mask_blocks(positions, span)
        for layer, (keys, values) in zip(w.layers, self.cache, strict=True):
            q, k, v = self._project(layer, x, cos, sin)
            keys[rows, :, positions], values[rows, :, positions] = k, v
            q = q.view(n, w.kv_heads, -1, w.head_dim) * w.head_dim**-0.5  # grouped queries share a key head, so the cache is not copied
            attended = [attend_to_cache(q[part], keys[part], values[part], mask) for part, mask in blocks]
            x = self._finish(layer, x, torch.cat(attended).flatten(1))
        return F.linear(F.rms_norm(x, x.shape[-1:], w.norm, w.eps), w.head)

    def _mask_blocks(self, positions: Tensor, span: int) -> list[tuple[slice, Tensor]]:
        """The slots of each block and what its attention adds to their scores, (slots, 1, 1, span of the block)."""
        size, n, blocks = block_size(self.rows, positions.device), len(positions), []
        for start in range(0, n, size):
            part = positions[start : start + size]
            width = span if size >= n else int(part.max()) + 1
            hidden = torch.arange(width, device=part.device) > part[:, None]
            mask = torch.zeros(len(part), 1, 1, width, dtype=self.weights.dtype, device=part.device)
            blocks.append((slice(start, start + len(part)), mask.masked_fill_(hidden[:, None, None], -math.inf)))
        return blocks

    def open_session(self, capacity: int, kept_prefixes: int = 0) -> "EngineSession":
        self._reserve(capacity, kept_prefixes > 0)
        self.sessions += 1
        return EngineSession(self, kept_prefixes)


class EngineSession(Session):
    """The decode loop: fill the slots, decode one token of each, sample, and free the slots of answers that ended."""

    def __init__(self, engine: Engine, kept_prefixes: int) -> None:
        self.engine, self.number = engine, engine.sessions  # no reference from the engine: that would keep an old cache
        self.spare_bytes = engine.spare_bytes
        self.scheduler = Scheduler(engine.cache, engine._prefill, kept_prefixes, engine.spare_bytes)

    def add(self, request: Request, sampling: Sampling) -> Ticket:
        ticket = self.engine.make_ticket(request, sampling)
        check_capacity(request, self.engine.capacity)
        self.scheduler.add(ticket)
        return ticket

    def drop(self, ticket: Ticket) -> None:
        self.scheduler.drop(ticket)

    def hold(self, ticket: Ticket) -> int:
        return self.scheduler.hold(ticket)

    def resume(self, ticket: Ticket) -> None:
        self.scheduler.resume(ticket)

    @property
    def is_busy(self) -> bool:
        return bool(self.scheduler.slots or self.scheduler.queue)

    @torch.inference_mode()
    def step(self) -> list[Ticket]:
        engine, scheduler = self.engine, self.scheduler
        if engine.sessions != self.number:
            raise RuntimeError("another session was opened on this engine: it has one cache")
        stopped = scheduler.refill()
        if not (tickets := scheduler.slots):
            return stopped
        logits = (engine.graphs or engine._decode)(*scheduler.step_inputs())
        engine.tag_mask.apply(logits, [t.enforcer for t in tickets])
        tokens, logprobs = sample_rows(logits, [t.sampling for t in tickets], uniform_draws(tickets))
        return stopped + scheduler.postprocess(tokens, logprobs, engine.stops)
