"""What both trainers are told alike: precision by what the machine has, where to write, whom to report to."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.models.device import detect

if TYPE_CHECKING:
    from torch import nn


def ensure_reporter(name: str) -> None:
    """Raise InputError when the package that training curves are to go to is missing: before anything is loaded."""
    if name != "none" and not find_spec(name):
        raise InputError(f"report_to is {name}, which is not installed: pip install {name}, or leave it at none")


def common(settings: Settings, output: Path, save_steps: int) -> dict[str, Any]:
    """Keyword arguments shared by TRL's SFTConfig and GRPOConfig.

    Weights keep their own dtype; the products run in bfloat16 wherever the machine computes in it, a CPU with avx512_bf16 included (1.6
    times as fast on the bundled model), in float16 on older GPUs, else in float32.
    """
    hardware = detect()
    gpu = hardware.device == "cuda"
    return {
        "output_dir": str(output),
        "seed": settings.seed,
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
        "logging_nan_inf_filter": False,  # it would log a loss that is NaN as 0, and the watch would not see it
    }


@contextmanager
def adapter_in_float32(model: "nn.Module") -> Iterator[None]:
    """Undo what both of TRL's trainers do as they are built within it: the adapter on a 4-bit base is cast to bfloat16.

    Of a weight of 0.02 bfloat16 keeps steps of 1e-4, and an update of less is lost; a T4 and a CPU without avx512_bf16 do not compute
    in it at all. The products still run in what `common` says.
    """
    before = {weight: weight.data for weight in model.parameters() if weight.requires_grad}
    yield
    for weight, values in before.items():
        weight.data = values.to(weight.device).float()
