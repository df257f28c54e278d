"""CUDA graphs of the decode step: on CUDA each size is recorded once and then replayed.

A small model's step is some hundred kernels, and launching them takes longer than running them. A recording has fixed shapes, so the
number of slots and the span are padded to powers of two. Padding rows use free slots, which the next request overwrites; padding
positions are masked. Where recording fails, the step runs without.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sbtiny.progress import console

Step = Callable[[Tensor, Tensor, int], Tensor]  # tokens (n,), positions (n,), span -> logits (n, vocabulary)
MIN_SPAN = 256  # shortest span recorded


@dataclass(frozen=True, slots=True)
class Recording:
    """`replay` computes `logits` (rows, vocabulary) from the input buffers."""

    replay: Callable[[], None]
    logits: Tensor


def capture_cuda_graph(step: Callable[[], Tensor], pool: tuple[int, int] | None) -> Recording:
    """Record a step on CUDA. It runs once before, on its own stream, so that the libraries' setup is not recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = step()
    return Recording(graph.replay, logits)


def round_to_power_of_two(count: int, least: int, most: int) -> int:
    """The next power of two, bounded by `least` and `most`; the bounds need not be powers of two."""
    return min(most, max(least, 1 << (count - 1).bit_length()))


class CudaGraphs:
    """A decode step for at most `rows` slots of `capacity` tokens; each size is recorded at its first use."""

    def __init__(self, step: Step, rows: int, capacity: int, device: torch.device) -> None:
        self.step, self.rows, self.capacity = step, rows, capacity
        self.tokens, self.positions = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.recordings: dict[tuple[int, int], Recording] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # shared: only one graph runs at a time
        self.fails = False

    def __call__(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """Logits (n, vocabulary); the next call overwrites them. tokens, positions (n,); span > every position."""
        if self.fails:
            return self.step(tokens, positions, span)
        n = len(tokens)
        size = (round_to_power_of_two(n, 1, self.rows), round_to_power_of_two(span, MIN_SPAN, self.capacity))
        self.tokens[:n], self.positions[:n], self.positions[n:] = tokens, positions, 0
        if size not in self.recordings:
            try:
                self.recordings[size] = self._record(*size)
            except RuntimeError as error:
                self.fails = True
                console.print(f"no CUDA graph for the decode step, it runs without: {str(error).splitlines()[0]}", markup=False)
                return self.step(tokens, positions, span)
        recording = self.recordings[size]
        recording.replay()
        return recording.logits[:n]

    def _record(self, rows: int, span: int) -> Recording:
        return capture_cuda_graph(lambda: self.step(self.tokens[:rows], self.positions[:rows], span), self.pool)
