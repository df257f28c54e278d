"""Attention as it is trained: rows of padding on the left, which mask whole queries."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbtiny.models.load import load_model


def gradients(width: int) -> list[Tensor]:
    """Of queries, keys and values (4, 14, width, 64) in bfloat16, the first rows of three of the four masked."""
    torch.manual_seed(0)
    shape = (4, 14, width, 64)
    parts = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.ones(width, width, dtype=torch.bool, device="cuda").tril()[None, None].repeat(4, 1, 1, 1)
    read = torch.ones(4, 1, width, 1, device="cuda")
    for row in range(4):
        mask[row, :, :, : 40 * row], read[row, :, : 40 * row] = False, 0
    (F.scaled_dot_product_attention(*parts, attn_mask=mask) * read).sum().backward()
    return [part.grad for part in parts]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [447, 448, 512])
def test_no_width_makes_a_gradient_nan(width: int) -> None:
    load_model("tiny")
    assert all(grad.isfinite().all() for grad in gradients(width))


def test_loading_a_model_forbids_the_attention_that_does() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model("tiny")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
