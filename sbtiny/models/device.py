"""This machine: device, memory, and the dtype for it."""

import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Device = Literal["cuda", "cpu"]
Dtype = Literal["float16", "bfloat16", "float32"]

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")  # a container's own, as it is seen from inside
CGROUP_FILES = (  # limit, use and the part of `memory.stat` that is cache, in version 2 and in version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
SMALL_MODEL_PARAMETERS = 50_000_000  # below this a CPU gains nothing from 16 bits
CPU_BF16 = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device that trains and decodes. `memory_gb`: its own memory in GiB. `threads`: those of torch."""

    device: Device
    name: str
    memory_gb: float
    dtype: Dtype
    threads: int


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The device as seen without torch. Memory in GiB; `capability` is CUDA's, `driver` NVIDIA's version."""

    device: Device
    name: str
    memory_gb: float
    free_gb: float
    capability: tuple[int, int] = (0, 0)
    cpu_bf16: bool = False
    driver: str = ""
    nvidia_smi_error: str = ""  # why an installed nvidia-smi reports no GPU


# The card of a preset: memory as CUDA reports it, and free memory without the share of a desktop or Colab.
CARDS = {
    "t4": DeviceInfo("cuda", "Tesla T4", 14.7, 14.5, (7, 5)),
    "rtx4090": DeviceInfo("cuda", "RTX 4090", 23.6, 23.0, (8, 9)),
}
NVIDIA_SMI_TIMEOUT_S = 20  # the first call after a start is slow
LARGE_CARD = 20  # GiB; from here on `auto` takes the preset of the 24 GB card


def pick_preset(seen: DeviceInfo) -> str:
    """The preset of `--preset auto` on this device."""
    if seen.device == "cpu":
        return "cpu"
    return "rtx4090" if seen.memory_gb >= LARGE_CARD else "t4"


def pick_dtype(device: Device, parameters: int | None, capability: tuple[int, int] = (0, 0), cpu_bf16: bool = False) -> Dtype:
    """The dtype for a model with this number of parameters (None: a large one).

    GPUs: bfloat16 from capability 8.0 on, float16 on older ones such as the T4. CPUs: bfloat16 for large models where the CPU computes
    in it, else float32, because for small models rounding costs more than memory.
    """
    if device == "cuda":
        return "bfloat16" if capability >= (8, 0) else "float16"
    large = parameters is None or parameters >= SMALL_MODEL_PARAMETERS
    return "bfloat16" if cpu_bf16 and large else "float32"


def detect_device(parameters: int | None = None) -> Hardware:
    """The first GPU CUDA finds, else the CPU; `dtype` suits a model with this number of parameters (None: a large one)."""
    import torch

    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        dtype = pick_dtype("cuda", parameters, capability=(found.major, found.minor))
        return Hardware("cuda", found.name, round(found.total_memory / 2**30, 1), dtype, threads)
    name, bf16 = read_cpu_name_and_bf16()
    return Hardware("cpu", name, round(cpu_memory()[0] / 2**30, 1), pick_dtype("cpu", parameters, cpu_bf16=bf16), threads)


def probe_device() -> DeviceInfo:
    """The first NVIDIA GPU, else the CPU. Takes milliseconds, because it needs no torch."""
    answer, smi_error = query_nvidia_smi()
    if gpu := parse_nvidia_smi(answer):
        return gpu
    name, bf16 = read_cpu_name_and_bf16()
    total, free = (round(size / 2**30, 1) for size in cpu_memory())
    return DeviceInfo("cpu", name, total, free, cpu_bf16=bf16, nvidia_smi_error=smi_error)


def cpu_memory() -> tuple[int, int]:
    """Bytes of memory, all and free: of the machine, or of the container where that has less."""
    seen, (limit, free) = psutil.virtual_memory(), read_cgroup(CGROUP)
    return int(min(seen.total, limit)), int(min(seen.available, free))


def read_cgroup(folder: Path) -> tuple[float, float]:
    """Bytes that a control group may use, and those it may still take; infinite without a limit."""
    for most, used, cache in CGROUP_FILES:
        try:
            limit, taken = (int((folder / name).read_text()) for name in (most, used))
            stat = dict(line.split() for line in (folder / most).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another version, or "max"
            continue
        return limit, max(0, limit - taken + int(stat.get(cache, 0)))  # cached files give way
    return math.inf, math.inf


def read_cpu_name_and_bf16() -> tuple[str, bool]:
    """The processor's name, and whether it computes in bfloat16."""
    cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    return cpu_name(cpuinfo), bool(CPU_BF16 & cpu_flags(cpuinfo))


def query_nvidia_smi() -> tuple[str, str]:
    """The answer of nvidia-smi, or the reason why an installed one gives none; both empty where it is not installed.

    Asks for the first GPU of CUDA_VISIBLE_DEVICES, which nvidia-smi itself does not read.
    """
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").partition(",")[0].strip()
    if tool is None or (visible is not None and first in ("", "-1")):
        return "", ""
    query = "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version"
    command = [tool, query, "--format=csv,noheader,nounits", *(["-i", first] if first else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {NVIDIA_SMI_TIMEOUT_S} s"
    except OSError as error:
        return "", f"does not start: {error.strerror}"
    if done.returncode or not parse_nvidia_smi(done.stdout):
        return "", " ".join(f"code {done.returncode}: {done.stdout} {done.stderr}".split())[:160]
    return done.stdout, ""


def parse_nvidia_smi(lines: str) -> DeviceInfo | None:
    """Parse the first line of the answer: name, total MiB, free MiB, capability, driver. None if it has another form."""
    line = re.match(r"(.+), *(\d+), *(\d+), *(\d+)\.(\d+), *(\S+)", lines)
    if not line:
        return None
    total, free = (round(int(mib) / 1024, 1) for mib in line.group(2, 3))
    return DeviceInfo("cuda", line[1], total, free, (int(line[4]), int(line[5])), driver=line[6])


def cpu_flags(cpuinfo: str) -> set[str]:
    """Instruction sets of the first processor in /proc/cpuinfo; empty on systems without that file."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
