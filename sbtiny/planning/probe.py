"""Five seconds on the device that is here: how fast it multiplies and reads memory, and what a plan's tokens then cost at least."""

import time
from collections.abc import Callable

import torch
from torch import nn

from sbtiny.models.device import detect
from sbtiny.planning.memory_plan import BYTES, Plan
from sbtiny.models.shapes import Shape

ROWS = 512  # tokens of the probing product
SECONDS = 2.5  # for each of the two measurements


def measure(shape: Shape, seconds: float = SECONDS) -> dict[str, float]:
    """`flops` a second of a feed-forward product of this model, and `bytes` a second of reading a matrix once for one token."""
    hardware = detect(shape.parameters)
    kind = getattr(torch, hardware.dtype)
    layer = nn.Linear(shape.width, shape.feed_forward, bias=False, device=hardware.device, dtype=kind)
    x = torch.randn(ROWS, shape.width, device=hardware.device, dtype=kind)
    work = 2 * ROWS * shape.width * shape.feed_forward
    with torch.inference_mode():
        flops = work * rate(lambda: layer(x), hardware.device, seconds)
        copies = [torch.empty_like(layer.weight) for _ in range(max(1, 2**28 // layer.weight.nbytes))]  # beyond the caches
        total = sum(copy.nbytes for copy in copies)
        read = total * rate(lambda: [copy.sum() for copy in copies], hardware.device, seconds)
    return {"flops": flops, "bytes": read}


def rate(action: Callable[[], object], device: str, seconds: float) -> float:
    """How often a second; the first time, which also warms up, does not count."""
    action()
    wait(device)
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        action()
        wait(device)
        done += 1
    return done / (time.perf_counter() - started)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def hours(plan: Plan, shape: Shape, speed: dict[str, float]) -> float:
    """Hours at least, were every answer as long as it may be: products alone, no attention, no sampling, no Python."""
    again = 8 if plan.device_kind == "cuda" else 6  # with gradient checkpointing the forward pass is made twice
    training = plan.tokens_at_most["trained"] * again * shape.linear / speed["flops"]
    step = max(shape.linear * BYTES[plan.dtype] / speed["bytes"], 2 * shape.parameters * plan.slots / speed["flops"])
    return (training + plan.tokens_at_most["sampled"] / max(plan.slots, 1) * step) / 3600
