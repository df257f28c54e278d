"""Attention for training on a CPU: plain products and a softmax.

torch's own kernel for a CPU works on small tiles and is slower than three matrix products up to a few hundred tokens, forward and backward
(dev/LOG.md, 36). It keeps no scores, so it stays for longer rows.
"""

from torch import Tensor, nn
from torch.nn import functional as F

NAME = "sbtiny_products"
MOST_SCORES = 1 << 24  # of a layer: 32 MiB in bfloat16, which the backward pass keeps


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attend to where `attention_mask` (n, 1, queries, keys) adds nothing: query (n, heads, queries, width), key and value of fewer heads.

    Returns (n, queries, heads, width). It is transformers' "eager" attention without copies of the keys that grouped queries share.
    """
    n, heads, length, width = query.shape
    if n * heads * length * key.shape[2] > MOST_SCORES:
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None
    grouped = (query * scaling).reshape(n, key.shape[1], -1, width)
    scores = (grouped @ key.transpose(2, 3)).view(n, key.shape[1], -1, length, key.shape[2])
    y = scores.add_(attention_mask[:, :, None]).softmax(-1).flatten(2, 3) @ value
    return y.view(n, heads, length, width).transpose(1, 2), None


def register() -> str:
    """Make it known to transformers; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME
