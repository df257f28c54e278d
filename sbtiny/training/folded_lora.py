"""A LoRA layer as one product on a CPU: x (W + scale B A)' in place of x W' + scale (x A') B', where the layer is small for its rank.

Beside a narrow layer the adapter's two thin products, the scaling and the sum take longer than the layer itself. Folded, the backward pass
needs the gradient of the whole weight, so a wide layer stays as it is. An update of the bundled model takes a fifth less (dev/LOG.md, 42).
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

THIN_COST = 4  # of a thin product against a square one, for a pass of hundreds of tokens; measured at rank 32, width 128


def fold_small_adapters(model: nn.Module) -> None:
    """Let the small LoRA layers of a PEFT model compute folded while they train. A GPU is not slowed by thin products."""
    for layer in model.modules():
        plain = type(layer) is Linear and type(layer.base_layer) is nn.Linear  # subclasses have weights that are no matrix to add to
        if plain and is_small(layer):
            layer.forward = partial(forward_folded, layer)


def is_small(layer: Linear) -> bool:
    """Whether the gradient of the whole weight costs less than the adapter's own products."""
    weights, rank = layer.in_features * layer.out_features, max(layer.r.values())
    return weights < THIN_COST * rank * (layer.in_features + layer.out_features)


def forward_folded(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own forward; folded where it trains with one plain adapter. Decoding has too few tokens to gain by it."""
    name = foldable_adapter(layer) if layer.training else None
    if name is None or args or kwargs:
        return Linear.forward(layer, x, *args, **kwargs)
    base = layer.base_layer
    with torch.autocast(x.device.type, enabled=False):  # summed in float32, then rounded once, as autocast rounds any weight
        weight = torch.addmm(base.weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
    return F.linear(x, weight, base.bias)


def foldable_adapter(layer: Linear) -> str | None:
    """The one active adapter if its change of the output is x times a matrix: without dropout, bias or a variant such as DoRA."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    change = layer.lora_B[name]
    return name if change.bias is None and change.weight.dtype == layer.base_layer.weight.dtype else None
