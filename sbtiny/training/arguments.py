"""Arguments of both trainers: precision, output folder, checkpoints, reporting."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.models.device import detect_device

if TYPE_CHECKING:
    from torch import nn


def require_reporter(name: str) -> None:
    """Raise InputError when the package of `report_to` is not installed; call it before loading a model."""
    if name != "none" and not find_spec(name):
        raise InputError(f"report_to is {name}, which is not installed: pip install {name}, or leave it at none")


def shared_training_args(settings: Settings, output: Path, save_steps: int) -> dict[str, Any]:
    """Keyword arguments shared by TRL's SFTConfig and GRPOConfig.

    Weights keep their own dtype. Products run in bfloat16 where the device supports it, also on a CPU with avx512_bf16 (1.6 times as fast
    on the bundled model), in float16 on older GPUs, else in float32.
    """
    hardware = detect_device()
    gpu = hardware.device == "cuda"
    return {
        "output_dir": str(output),
        "seed": settings.seed,
        "optim": "adamw_torch_fused",  # TRL's own; unsloth's configs would take 8-bit Adam and a weight decay of 0.001
        "weight_decay": 0.0,
        "use_cpu": not gpu,
        "bf16": hardware.dtype == "bfloat16",
        "fp16": hardware.dtype == "float16",
        "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "save_total_limit": 2,
        "report_to": settings.report_to,
        "run_name": output.name,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would log a NaN loss as 0 and hide it from the monitor
    }


@contextmanager
def keep_adapter_float32(model: "nn.Module") -> Iterator[None]:
    """Keep the adapter in float32 while a trainer is built inside: TRL casts the adapter on a 4-bit base to bfloat16.

    At a weight of 0.02 bfloat16 has steps of 1e-4, so smaller updates are lost. A T4 and a CPU without avx512_bf16 do not compute in it at
    all. The products still run in the precision of `shared_training_args`.
    """
    originals = {weight: weight.data for weight in model.parameters() if weight.requires_grad}
    yield
    for weight, values in originals.items():
        weight.data = values.to(weight.device).float()
