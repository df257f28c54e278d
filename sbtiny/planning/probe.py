"""Measure this device's speed in five seconds, and estimate the least hours of a plan from it."""

import time
from collections.abc import Callable

import torch
from torch import nn

from sbtiny.models.device import detect_device
from sbtiny.models.shapes import Shape
from sbtiny.planning.memory_plan import BYTES, MemoryPlan

ROWS = 512  # tokens of the measured product
SECONDS = 2.5  # for each of the two measurements


def benchmark_device(shape: Shape, seconds: float = SECONDS) -> dict[str, float]:
    """`flops` per second of a feed-forward product of this model, and `bytes` per second of reading a matrix for one token."""
    hardware = detect_device(shape.parameters)
    dtype = getattr(torch, hardware.dtype)
    layer = nn.Linear(shape.width, shape.feed_forward, bias=False, device=hardware.device, dtype=dtype)
    x = torch.randn(ROWS, shape.width, device=hardware.device, dtype=dtype)
    work = 2 * ROWS * shape.width * shape.feed_forward
    with torch.inference_mode():
        flops = work * measure_rate(lambda: layer(x), hardware.device, seconds)
        copies = [torch.empty_like(layer.weight) for _ in range(max(1, 2**28 // layer.weight.nbytes))]  # larger than the caches
        total = sum(copy.nbytes for copy in copies)
        read = total * measure_rate(lambda: [copy.sum() for copy in copies], hardware.device, seconds)
    return {"flops": flops, "bytes": read}


def measure_rate(action: Callable[[], object], device: str, seconds: float) -> float:
    """Calls of `action` per second; the first call warms up and does not count."""
    action()
    synchronize(device)
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        action()
        synchronize(device)
        done += 1
    return done / (time.perf_counter() - started)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def estimate_hours(plan: MemoryPlan, shape: Shape, speed: dict[str, float]) -> float:
    """Least hours of a plan with answers of full length: matrix products alone, without attention, sampling and Python."""
    # A frozen weight and token: forward, and back to its inputs. Gradient checkpointing computes the forward pass twice.
    flops = 6 if plan.target.device == "cuda" else 4
    used = shape.linear + shape.vocabulary * shape.width  # with the output embedding
    training = plan.tokens_at_most["trained"] * flops * used / speed["flops"]
    step = max(used * BYTES[plan.dtype] / speed["bytes"], 2 * used * plan.slots / speed["flops"])
    return (training + plan.tokens_at_most["sampled"] / max(plan.slots, 1) * step) / 3600
