"""Token log-probabilities without a GPU: TRL 1.15 computes them in Triton kernels only, so on a CPU both its trainers fail.

`patch_trl_for_cpu` replaces the kernel by a PyTorch function with the same contract where there is no CUDA device. Logits are never held
whole: tokens go through the head in chunks, which are computed again in the backward pass.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sbtiny.models.shapes import HEAD_CHUNK


def chunk_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None) -> Tensor:
    """Log-probability, entropy and is-top-1 of a chunk, (3, n): hidden (n, width), weight (vocabulary, width), targets (n,)."""
    logits = F.linear(hidden, weight.to(hidden.dtype), bias).float() * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logprobs = logits.log_softmax(-1)
    taken = logprobs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():  # both only feed the log
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        top = (logprobs.argmax(-1) == targets).float()
    return torch.stack((taken, entropy, top))


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
    ) -> tuple[Tensor, Tensor | None, None, None, Tensor | None]:
        if unknown := set(outputs) - {"log_probs", "entropy", "is_top1"}:
            raise NotImplementedError(f"TRL asks for {sorted(unknown)} on a CPU")
        if cap is None:
            scale, temperature = scale / temperature, 1.0
        elif temperature != 1.0:
            raise NotImplementedError("soft-capped logits with a temperature on a CPU")
        parts = list(zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True))
        if len(parts) == 1:  # recomputing a single chunk would save no memory
            stats = [chunk_stats(hidden, weight, bias, targets, scale, cap)]
        else:
            stats = [checkpoint(chunk_stats, h, weight, bias, t, scale, cap, use_reentrant=False) for h, t in parts]
        taken, entropy, top = torch.cat(stats, 1)
        return taken, entropy.detach(), None, None, top.detach().bool()


def patch_trl_for_cpu() -> None:
    """Make TRL's trainers work without a CUDA device; call it before building a trainer."""
    from trl.trainer import utils

    if not torch.cuda.is_available():
        utils._ChunkedLogProbFunction = ChunkedLogProbs
