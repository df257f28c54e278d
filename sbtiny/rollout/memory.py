"""Memory of this process, and the number of slots whose keys and values fit into it.

`max_num_seqs` is an upper bound, as in vLLM: where fewer slots fit, one line says so and requests wait. No slot at all is an error.
"""

import ctypes
import os
import sys

import psutil
import torch

from sbtiny.errors import InputError
from sbtiny.models.device import cpu_memory
from sbtiny.progress import console

FREE_MEMORY_SHARE = 0.8  # of the free memory; the rest is for activations
SPARE_SHARE = 0.2  # of the room for keys and values, left beside the slots for the states of answers that are in none
M_MMAP_THRESHOLD = -3  # of malloc.h


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return cpu_memory()[1]


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: reserved on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_freed_memory() -> None:
    """Make glibc return large buffers to the system as they are freed. A setting of the user's in the environment wins.

    By default it keeps buffers up to 32 MB for reuse. With answers of every length none fits again: a cold start of smollm2-135m held
    8.8 GiB instead of 6.3 (dev/LOG.md, 26). New buffers cost time: 50 % more beside a tiny model, up to 40 % of an update of 0.5B (LOG 32).
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or os.name == "nt":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**20)


def fit_slots(slot: int, wanted: int, limit: float | None, device: torch.device, keeps_states: bool = False) -> tuple[int, int]:
    """Number of slots of `slot` bytes, at most `wanted`, within `limit` GiB (default: the free memory), and the bytes that they leave.

    `keeps_states`: SPARE_SHARE is left for the states of held and ended answers, unless a single slot needs it. Fewer slots give a line
    on stderr. Raises InputError when not one fits.
    """
    whole = limit * 2**30 if limit is not None else free_bytes(device) * FREE_MEMORY_SHARE
    room = max(whole * (1 - SPARE_SHARE), min(whole, slot)) if keeps_states else whole
    fitting = min(wanted, int(room // slot))
    reason = f"one needs {slot / 2**30:.3g} GiB of KV cache, {room / 2**30:.3g} GiB is available"
    if fitting < 1:
        raise InputError(f"no room for an answer: {reason}: lower max_tokens, or raise --kv-memory")
    if fitting < wanted:
        console.print(f"decoding {fitting} answers at once, not {wanted}: {reason}", markup=False)
    return fitting, int(whole) - fitting * slot
