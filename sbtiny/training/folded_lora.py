"""A LoRA layer as one product on a CPU: x (W + scale B A) in place of x W + scale (x A) B, where the layer is small for its rank.

Beside a narrow layer the adapter's two thin products, the scaling and the sum take longer than the layer itself. Folded, the backward pass
needs the gradient of the whole weight, so a wide layer stays as it is. An update of the bundled model takes a fifth less (dev/LOG.md, 42).
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

THIN_COST = 4  # a product with rank columns counts for so many square ones: three of them (forward, two backward) and the sums beside them


def fold_small_adapters(model: nn.Module) -> None:
    """Let the small LoRA layers of a PEFT model compute folded on a CPU. A GPU is not slowed by thin products."""
    if torch.cuda.is_available():
        return
    for layer in model.modules():
        if type(layer) is Linear and is_small(layer):  # not its subclasses: 4-bit weights have no sum
            layer.forward = partial(forward_folded, layer)


def is_small(layer: Linear) -> bool:
    """Whether the gradient of the whole weight costs less than the adapter's own products."""
    wide, rank = layer.in_features * layer.out_features, max(layer.r.values())
    return wide < THIN_COST * rank * (layer.in_features + layer.out_features)


def forward_folded(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own forward; folded where one plain adapter is active."""
    name = foldable_adapter(layer)
    if name is None or args or kwargs:
        return Linear.forward(layer, x, *args, **kwargs)
    base = layer.get_base_layer()
    with torch.autocast(x.device.type, enabled=False):  # the sum keeps float32, only the product is rounded
        weight = torch.addmm(base.weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
    return F.linear(x, weight, base.bias)


def foldable_adapter(layer: Linear) -> str | None:
    """The one active adapter if its change of the output is x times a matrix: without dropout, bias or a variant such as DoRA."""
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    plain = name in layer.lora_A and name not in layer.lora_variant and isinstance(layer.lora_dropout[name], nn.Identity)
    same = plain and layer.lora_B[name].bias is None and layer.lora_B[name].weight.dtype == layer.get_base_layer().weight.dtype
    return name if same else None
