"""The machine of a measurement, and peak memory."""

import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sbtiny.models.device import detect_device

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def describe_machine() -> dict[str, Any]:
    hardware = detect_device()
    packages = ("torch", "transformers", "trl", "peft")
    return {
        "device": hardware.device,
        "name": hardware.name,
        "memory_gb": hardware.memory_gb,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # not on Windows
        "versions": {name: version(name) for name in packages},
    }


def reset_peak_memory() -> None:
    """Start measuring peak memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM, see proc(5)


def read_peak_mb() -> float | None:
    """Peak memory in MiB since `reset_peak_memory`, of the GPU or else of this process; None if the system does not report it."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    if not STATUS.exists():
        return None
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")), None)
    return None if line is None else round(int(line.split()[1]) / 1024, 1)


def largest_peak(peaks: Iterable[float | None]) -> float | None:
    return max((peak for peak in peaks if peak is not None), default=None)
