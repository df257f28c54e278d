"""Token log-probabilities without a GPU: TRL 1.15 computes them in Triton kernels only, so on a CPU both its trainers fail.

`patch_trl` replaces the kernel by a PyTorch function with the same contract. The gradient is made in the forward pass, beside the
probabilities that it needs: log-probabilities of tokens depend each on its own hidden state, so what the backward pass is given only scales
it. Logits are thus computed once, a chunk of tokens at a time, and none is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sbtiny.models.shapes import HEAD_CHUNK

HEAD_BLOCK = 1 << 20  # logits that are summed at once: they fit the processor's cache


class TokenLogProbs(Function):
    """Log-probability, entropy and is-top-1 of tokens, (n,) each: hidden (n, width), weight (vocabulary, width), targets (n,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, cap: float | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = weight.to(kind)  # once: autocast would cast it for every chunk
        taken, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        top = hidden.new_empty(len(hidden), dtype=torch.bool)
        slope = torch.empty_like(hidden, dtype=kind) if ctx.needs_input_grad[0] else None
        step = max(1, HEAD_BLOCK // len(weight))
        for start in range(0, len(hidden), HEAD_CHUNK):
            chunk = slice(start, start + HEAD_CHUNK)
            logits = F.linear(hidden[chunk].to(kind), weight, bias)
            for block in zip(*(x.split(step) for x in (logits, targets[chunk], taken[chunk], entropy[chunk], top[chunk])), strict=True):
                score_block(*block, temperature, cap, scale)
            if slope is not None:
                slope[chunk] = logits @ weight
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, top)  # both only feed the log
        return taken, entropy, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None, None, None, None, None


def score_block(
    logits: Tensor, targets: Tensor, taken: Tensor, entropy: Tensor, top: Tensor, temperature: float, cap: float | None, scale: float
) -> None:
    """Write the three results of some rows, and into `logits` (rows, vocabulary) the gradient of `taken` by them."""
    scores, targets = logits.float() * scale, targets[:, None]
    bend = scale / temperature
    if cap is not None:
        scores = torch.tanh(scores / cap)
        bend *= 1 - scores.square()  # how the cap damps a logit's change
        scores *= cap
    logprobs = scores.div_(temperature).log_softmax(-1)
    taken.copy_(logprobs.gather(-1, targets)[:, 0])
    top.copy_(logprobs.argmax(-1) == targets[:, 0])
    probs = torch.exp(logprobs, out=scores)
    entropy.copy_(-torch.linalg.vecdot(probs, logprobs))
    probs.scatter_add_(-1, targets, -torch.ones_like(targets, dtype=probs.dtype))
    logits.copy_(probs.mul_(-bend))


class ChunkedLogProbs:
    """Replaces TRL's `ChunkedLogProbFunction`: the same arguments, the same five results."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        _chunk: int,
        cap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor, None, None, Tensor]:
        if unknown := set(outputs) - {"log_probs", "entropy", "is_top1"}:
            raise NotImplementedError(f"TRL asks for {sorted(unknown)} on a CPU")
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise NotImplementedError("training the output embedding on a CPU")
        taken, entropy, top = TokenLogProbs.apply(hidden, weight, bias, targets, temperature, cap, scale)
        return taken, entropy, None, None, top


def patch_trl() -> None:
    """Make TRL's trainers work without a CUDA device; call it before building a trainer."""
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = ChunkedLogProbs
