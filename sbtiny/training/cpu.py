"""Training without a GPU: TRL's kernel replaced, attention by blocks, small LoRA layers as one product."""

import torch
from torch import nn

from sbtiny.training.attention import use_block_attention
from sbtiny.training.folded_lora import fold_small_adapters
from sbtiny.training.logprobs import patch_trl


def prepare_for_cpu(model: nn.Module) -> None:
    """Let TRL's trainers run without a CUDA device, and this PEFT model train faster; call it before building a trainer.

    Where there is a CUDA device nothing changes.
    """
    if torch.cuda.is_available():
        return
    patch_trl()
    use_block_attention(model)
    fold_small_adapters(model)
