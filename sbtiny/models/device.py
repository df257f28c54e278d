"""What is here: device, memory, and the number format that suits it."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cuda", "cpu"]
Dtype = Literal["bfloat16", "float16", "float32"]

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
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


@dataclass(frozen=True, slots=True)
class Seen:
    """What can be told of the device without torch: memory in GiB, `capability` of a GPU, `driver` of NVIDIA."""

    device: Device
    name: str
    memory_gb: float
    free_gb: float
    capability: tuple[int, int] = (0, 0)
    cpu_bf16: bool = False
    driver: str = ""
    silent: str = ""  # why nvidia-smi, which is installed, told of no GPU


# The card that a preset is made for: memory as CUDA reports it for such cards, less what a desktop or Colab takes.
CARDS = {
    "t4": Seen("cuda", "Tesla T4", 14.7, 14.5, (7, 5)),
    "rtx4090": Seen("cuda", "RTX 4090", 23.6, 23.0, (8, 9)),
}
PATIENCE = 20  # seconds for nvidia-smi; a first call after starting up takes some
LARGE_CARD = 20  # GiB from which on the preset of the 24 GB card is meant


def pick_preset(seen: Seen) -> str:
    """What `--preset auto` stands for on this machine."""
    if seen.device == "cpu":
        return "cpu"
    return "rtx4090" if seen.memory_gb >= LARGE_CARD else "t4"


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
    return Hardware("cpu", cpu_name(cpuinfo), round(total_memory(), 1), dtype, threads)


def total_memory() -> float:
    """Of this machine, in GiB."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    import psutil  # Windows; accelerate needs it, so it is there

    return psutil.virtual_memory().total / 2**30


def glance() -> Seen:
    """The device as the system tells of it, in milliseconds and without torch: the first NVIDIA GPU, else the processor."""
    told, silent = ask_gpu()
    if found := read_gpu(told):
        return found
    cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    total = total_memory()
    free = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text() if MEMINFO.is_file() else "", re.MULTILINE)
    free_gb = int(free[1]) / 2**20 if free else total
    bf16 = bool(CPU_BF16 & cpu_flags(cpuinfo))
    return Seen("cpu", cpu_name(cpuinfo), round(total, 1), round(free_gb, 1), cpu_bf16=bf16, silent=silent)


def ask_gpu() -> tuple[str, str]:
    """The answer of nvidia-smi, and why there is none where it is installed: a driver that hangs or does not match is no GPU.

    It tells of the first GPU that CUDA_VISIBLE_DEVICES, which nvidia-smi itself does not read, leaves to CUDA.
    """
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").partition(",")[0].strip()
    if tool is None or (visible is not None and first in ("", "-1")):
        return "", ""
    query = "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version"
    asked = [tool, query, "--format=csv,noheader,nounits", *(["-i", first] if first else [])]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {PATIENCE} s"
    except OSError as error:
        return "", f"does not start: {error.strerror}"
    if done.returncode or not read_gpu(done.stdout):
        return "", " ".join(f"code {done.returncode}: {done.stdout} {done.stderr}".split())[:160]
    return done.stdout, ""


def read_gpu(lines: str) -> Seen | None:
    """The first line of nvidia-smi's answer: name, MiB in all, MiB free, capability, driver; None where it is no such line."""
    found = re.match(r"(.+), *(\d+), *(\d+), *(\d+)\.(\d+), *(\S+)", lines)
    if not found:
        return None
    total, free = (round(int(number) / 1024, 1) for number in found.group(2, 3))
    return Seen("cuda", found[1], total, free, (int(found[4]), int(found[5])), driver=found[6])


def cpu_flags(cpuinfo: str) -> set[str]:
    """Instruction sets the first processor lists in /proc/cpuinfo; empty on systems that have no such file."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
