"""Causal attention for training on a CPU: products and a softmax, block after block of queries.

torch's own kernel works on tiles that are small for a CPU: forward and backward it takes two to four times as long as these products in
bfloat16, 1.2 to 1.7 times in float32 (dev/LOG.md, 37). It keeps no scores, so it stays for long rows, and for whatever else than plain
causal attention a model asks for.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "sbtiny_blocks"
BLOCK = 128  # queries: few enough to skip most of the keys behind them, many enough for a product
MOST_SCORES = 1 << 24  # of a layer; about half are kept for the backward pass: 16 to 32 MiB in bfloat16, twice that in float32


def use_block_attention(model: nn.Module) -> None:
    """Let a model of transformers compute attention by `attend`. A GPU has better kernels of its own."""
    register()
    model.set_attn_implementation(NAME)


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend from query (n, heads, length, width) to key and value of as many heads or fewer where the mask (n, 1, length, length) is true.

    Returns (n, length, heads, width of a value). Without a mask each query sees the keys up to its own. Behind its own it must see none.
    """
    n, heads, length, width = query.shape
    if not is_plain(module, attention_mask, options) or length != key.shape[2] or n * heads * length**2 > MOST_SCORES:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    grouped = (query * options["scaling"]).to(dtype).view(n, key.shape[1], -1, length, width)  # heads that share a key lie together
    key, value = key.to(dtype).contiguous(), value.to(dtype).contiguous()
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        scores = grouped[:, :, :, start:stop].flatten(2, 3) @ key[:, :, :stop].mT
        scores = scores.view(n, key.shape[1], -1, stop - start, stop).add_(block_bias(attention_mask, start, stop, dtype))
        blocks.append((scores.softmax(-1).flatten(2, 3) @ value[:, :, :stop]).view(n, heads, stop - start, -1))
    return torch.cat(blocks, dim=2).transpose(1, 2), None


def is_plain(module: nn.Module, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether no more than causal attention is asked for, with a mask of true and false."""
    causal = options.get("is_causal") is not False and getattr(module, "is_causal", True)
    more = any(options.get(name) is not None for name in ("softcap", "position_bias", "s_aux")) or options.get("dropout")
    return causal and not more and options.get("scaling") is not None and (mask is None or mask.dtype == torch.bool)


def block_bias(mask: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of queries `start` to `stop` (n or 1, 1, 1, queries, keys): 0 for a key that is seen.

    Else it is far below any score and not -inf: padding sees no key at all, and its softmax must not be NaN.
    """
    seen = torch.ones(1, 1, stop - start, stop, dtype=torch.bool).tril(start) if mask is None else mask[:, :, start:stop, :stop]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min / 2)[:, :, None]
