"""The server's queue, simulated for loads that no machine here holds: its order, first come first served and an oracle, same arrivals.

Times are in mean services: a body of mean length takes 1 in its slot, whatever runs beside it. Slots are not preempted.
"""

import heapq
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sbtiny.bench.lengths import summarize
from sbtiny.serving.queue import BodyQueue, rank_first_come, rank_oracle, rank_shortest_stated

STATED_NOISE = 0.3  # standard deviation of log(stated / length), as a share of the lengths' own
Rank = Callable[[float, float, float], float]  # stated, length, arrival -> what the queue sorts by


@dataclass(frozen=True, slots=True)
class ServeLoad:
    """Requests that come at random at `load` x what the slots can do; `load` None: all at once.

    Lengths are drawn from `answer_lengths`, or log-normal; `sigma` is the standard deviation of their logarithm. `ageing`: c in mean
    lengths a mean service; None is the queue's own.
    """

    slots: int = 4
    load: float | None = 0.9
    sigma: float = 1.0
    requests: int = 60_000
    seed: int = 0
    ageing: float | None = None
    answer_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Arrival, length and stated length of each request, in mean services."""

    times: list[float]
    lengths: list[float]
    stated: list[float]


def draw_arrivals(load: ServeLoad) -> Arrivals:
    rng = np.random.default_rng(load.seed)
    if load.answer_lengths:
        lengths = rng.choice(load.answer_lengths, load.requests) / np.mean(load.answer_lengths)
    else:
        lengths = np.exp(rng.normal(-(load.sigma**2) / 2, load.sigma, load.requests))
    stated = lengths * np.exp(rng.normal(0, STATED_NOISE * load.sigma, load.requests))
    times = np.zeros(load.requests)
    if load.load is not None:
        times = np.cumsum(rng.exponential(1 / (load.load * load.slots), load.requests))
    return Arrivals(times.tolist(), lengths.tolist(), stated.tolist())


def simulate(arrivals: Arrivals, slots: int, rank: Rank, ageing: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Time in the system and time until the start of each request. Those that come at one time are all filed before one starts."""
    times, lengths, stated = arrivals.times, arrivals.lengths, arrivals.stated
    queue = BodyQueue(slots, max_waiting=None, ageing=ageing)
    running: list[tuple[float, int]] = []  # end and request of each busy slot
    starts = [0.0] * len(times)
    come, count = 0, len(times)
    while come < count or running:
        now = min(times[come] if come < count else np.inf, running[0][0] if running else np.inf)
        while running and running[0][0] <= now:
            ended = heapq.heappop(running)[1]
            queue.record_service(stated[ended], lengths[ended], now)
        while come < count and times[come] <= now:
            queue.push(come, rank(stated[come], lengths[come], times[come]), now)
            come += 1
        while queue and len(running) < slots:
            begun = queue.pop(now)
            starts[begun] = now
            heapq.heappush(running, (now + lengths[begun], begun))
    waits = np.array(starts) - np.array(times)
    return waits + np.array(lengths), waits


def measure(arrivals: Arrivals, load: ServeLoad) -> dict[str, dict[str, float]]:
    """Mean, median, 99th percentile and longest time in the system, and the longest wait, of each order on these arrivals."""
    orders: dict[str, tuple[Rank, float | None]] = {
        "fcfs": (rank_first_come, 0.0),
        "ours": (rank_shortest_stated, load.ageing),
        "ours_without_ageing": (rank_shortest_stated, 0.0),
        "oracle": (rank_oracle, 0.0),
    }
    figures = {}
    for name, (rank, ageing) in orders.items():
        times, waits = simulate(arrivals, load.slots, rank, ageing)
        p50, p99 = np.percentile(times, [50, 99])
        found = {"mean": times.mean(), "p50": p50, "p99": p99, "longest": times.max(), "longest_wait": waits.max()}
        figures[name] = {key: float(value) for key, value in found.items()}
    return figures


def compare_orders(load: ServeLoad, rounds: int = 1, advance: Callable[..., None] = lambda: None) -> dict[str, Any]:
    """Figures of each order (medians over the rounds, one seed each), and their ratios over first come first served (median and range)."""
    runs = []
    for turn in range(rounds):
        runs.append(measure(draw_arrivals(seeded := replace(load, seed=load.seed + turn)), seeded))
        advance()
    result: dict[str, Any] = {"unit": "mean services", "slots": load.slots, "load": load.load, "sigma": load.sigma}
    result |= {"requests": load.requests, "rounds": rounds, "seed": load.seed, "ageing": load.ageing, "orders": {}}
    for name in runs[0]:
        figures = {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]}
        ratios = {key: summarize([over(run[name][key], run["fcfs"][key]) for run in runs]) for key in figures}
        result["orders"][name] = figures | ({} if name == "fcfs" else {"over_fcfs": ratios})
    return result


def over(time: float, by_fcfs: float) -> float:
    """A time over that of first come first served; 1 where both are 0: with so many slots nobody waits in any order."""
    return time / by_fcfs if by_fcfs else 1.0
