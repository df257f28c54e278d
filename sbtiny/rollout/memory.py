"""How many slots of keys and values fit into memory."""

from pathlib import Path

import torch

from sbtiny.errors import InputError

SHARE = 0.8  # of what is free; the rest is for activations
MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on this device; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if not MEMINFO.is_file():
        return None
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def slots_within(slot: int, wanted: int, limit_gb: float | None, device: torch.device) -> int:
    """At most `wanted` slots of `slot` bytes within `limit_gb`, or within what is free. Raises InputError when not one fits."""
    free = free_bytes(device)
    room = limit_gb * 2**30 if limit_gb is not None else None if free is None else free * SHARE
    fitting = wanted if room is None else min(wanted, int(room // slot))
    if fitting < 1:
        raise InputError(
            f"one answer needs {slot / 2**30:.2f} GiB of cache and {room / 2**30:.2f} GiB is there: "
            "lower max_tokens, or raise the limit of the cache"
        )
    return fitting
