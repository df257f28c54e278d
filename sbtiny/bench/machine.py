"""What a figure was measured on, and how much memory it took."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sbtiny.models.device import detect

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def machine() -> dict[str, Any]:
    hardware = detect()
    packages = ("torch", "transformers", "trl", "peft")
    return {
        "device": hardware.device,
        "name": hardware.name,
        "memory_gb": hardware.memory_gb,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # Windows knows none
        "versions": {name: version(name) for name in packages},
    }


def forget_peak() -> None:
    """Start measuring peak memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM, see proc(5)


def peak_mb() -> float | None:
    """Peak memory since `forget_peak` in MiB: the GPU's, or all of this process; None where the system does not say."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)
