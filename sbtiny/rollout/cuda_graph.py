"""The decode step without its launches: on CUDA it is recorded once for each size and then played back.

A small model's step is some hundred kernels that take less time than it takes to launch them one by one. A recording has fixed shapes, so
slots and span are rounded up to powers of two: the rows too many fill free slots, whose memory the next request overwrites, and the
positions too many are masked. Where recording fails the step runs as it is written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sbtiny.progress import console

Step = Callable[[Tensor, Tensor, int], Tensor]  # tokens (n,), positions (n,), span -> logits (n, vocabulary)
SPAN = 256  # the shortest


@dataclass(frozen=True, slots=True)
class Recording:
    """`replay` computes `logits` (rows, vocabulary) from what stands in the input buffers."""

    replay: Callable[[], None]
    logits: Tensor


def record(step: Callable[[], Tensor], pool: tuple[int, int] | None) -> Recording:
    """Record a step on CUDA; it runs before, on a stream of its own, so that what libraries set up at first is not recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = step()
    return Recording(graph.replay, logits)


def rounded(count: int, least: int, most: int) -> int:
    """The next power of two, from `least` to `most`, which need not be one."""
    return min(most, max(least, 1 << (count - 1).bit_length()))


class Graphs:
    """A decode step for at most `rows` slots of `capacity` tokens, recorded as each size is first met."""

    def __init__(self, step: Step, rows: int, capacity: int, device: torch.device) -> None:
        self.step, self.rows, self.capacity = step, rows, capacity
        self.tokens, self.positions = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.recordings: dict[tuple[int, int], Recording] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # one memory for all: they run in turn
        self.fails = False

    def __call__(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """Logits (n, vocabulary), to be read before the next call. tokens, positions (n,); span > every position."""
        if self.fails:
            return self.step(tokens, positions, span)
        n = len(tokens)
        size = (rounded(n, 1, self.rows), rounded(span, SPAN, self.capacity))
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
        return record(lambda: self.step(self.tokens[:rows], self.positions[:rows], span), self.pool)
