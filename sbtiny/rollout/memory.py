"""How many slots of keys and values fit into memory.

Slots are a wish: as with vLLM's `max_num_seqs`, what does not fit waits for its turn, and one line says so. Not even one is an error.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

from sbtiny.errors import InputError
from sbtiny.progress import console

SHARE = 0.8  # of what is free; the rest is for activations
MEMINFO = Path("/proc/meminfo")
M_MMAP_THRESHOLD = -3  # of malloc.h


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on this device; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if not MEMINFO.is_file():
        return None
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: reserved on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        told = psutil.Process().memory_info()
        return getattr(told, "peak_wset", told.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_freed() -> None:
    """Have large buffers given back to the system as they are freed, where the C library is glibc.

    It keeps those of up to 32 MB for the next of their size; with answers of every length they fit nothing, and a cold start of
    smollm2-135m held 8.8 GiB where it needed 6.3 (dev/LOG.md, 26). Getting them anew costs nothing beside a model of that size, and half
    as much time again beside a tiny one. What the user has told the C library stands.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or os.name == "nt":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**20)


def slots_within(slot: int, wanted: int, limit: float | None, device: torch.device) -> int:
    """At most `wanted` slots of `slot` bytes within `limit` GiB, or within what is free; fewer are told on stderr.

    Raises InputError when not one fits.
    """
    free = free_bytes(device)
    room = limit * 2**30 if limit is not None else None if free is None else free * SHARE
    fitting = wanted if room is None else min(wanted, int(room // slot))
    said = "" if room is None else f"one answer takes {slot / 2**30:.3g} GiB of cache and {room / 2**30:.3g} GiB is there"
    if fitting < 1:
        raise InputError(f"{said}: lower max_tokens, or raise --kv-memory")
    if fitting < wanted:
        console.print(f"{fitting} answers at a time, not {wanted}: {said}", markup=False)
    return fitting
