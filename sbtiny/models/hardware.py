"""What is here: device, memory, and the number format that suits it."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cuda", "cpu"]
Dtype = Literal["bfloat16", "float16", "float32"]

CPUINFO = Path("/proc/cpuinfo")
SMALL = 50_000_000  # parameters under which a CPU gains nothing from 16 bits
CPU_BF16 = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device training and decoding run on: `memory_gb` is its own memory in GiB, `threads` those of torch."""

    device: Device
    name: str
    memory_gb: float
    dtype: Dtype
    threads: int


def pick_dtype(
    device: Device, parameters: int | None, capability: tuple[int, int] = (0, 0), cpu_bf16: bool = False
) -> Dtype:
    """The number format for a model of so many parameters (None: a large one).

    bfloat16 where the device computes in it, which CUDA does from capability 8.0 on; float16 on older GPUs such as the
    T4; float32 on other CPUs, and on every CPU for small models, where rounding costs more than memory.
    """
    if device == "cuda":
        return "bfloat16" if capability >= (8, 0) else "float16"
    large = parameters is None or parameters >= SMALL
    return "bfloat16" if cpu_bf16 and large else "float32"


def detect(parameters: int | None = None) -> Hardware:
    """The first GPU CUDA finds, else the CPU; `dtype` suits a model of so many parameters (None: a large one)."""
    import torch

    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        dtype = pick_dtype("cuda", parameters, capability=(found.major, found.minor))
        return Hardware("cuda", found.name, round(found.total_memory / 2**30, 1), dtype, threads)
    cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    dtype = pick_dtype("cpu", parameters, cpu_bf16=bool(CPU_BF16 & cpu_flags(cpuinfo)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Hardware("cpu", cpu_name(cpuinfo), round(memory, 1), dtype, threads)


def cpu_flags(cpuinfo: str) -> set[str]:
    """Instruction sets the first processor lists in /proc/cpuinfo; empty on systems that have no such file."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
