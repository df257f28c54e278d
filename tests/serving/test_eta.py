"""The seconds until a body begins: by hand, and against what happens in a simulated queue."""

import heapq
import math

import numpy as np
import pytest

from sbtiny.bench.serve_simulation import ServeLoad, draw_arrivals
from sbtiny.serving.eta import add_overtakers, estimate_start, first_free_slot, gamma_band
from sbtiny.serving.queue import BodyQueue, Overtaker


def test_the_slot_that_is_free_first() -> None:
    assert first_free_slot([], [5, 3, 8], 3) == 3
    assert first_free_slot([], [5, 3], 3) == 0
    assert first_free_slot([4], [5, 3, 8], 3) == 5  # 4 goes where 3 ends
    assert first_free_slot([4, 1, 1], [5, 3, 8], 3) == 7
    assert first_free_slot([4], [], 1) == 4
    assert first_free_slot([], [1, 2, 9], 2) == 2  # more run than there are slots: two must end
    assert first_free_slot([], [-3], 1) == 0  # over its budget


def test_newcomers_lengthen_the_wait() -> None:
    assert add_overtakers(10, []) == 10
    assert add_overtakers(10, [(0.5, math.inf)]) == 20
    assert add_overtakers(10, [(0.5, 4)]) == 12
    assert add_overtakers(10, [(0.5, 4), (0.2, math.inf)]) == 15
    assert add_overtakers(10, [(1.5, 4)]) == 16  # more come than the slots can do, but not for long
    assert add_overtakers(10, [(1.5, math.inf)]) is None


def test_seconds_and_band() -> None:
    found = estimate_start([100, 100], [40], 1, 20.0, spread=0.0, noise=0.1)
    assert found.seconds == pytest.approx(12)
    assert 10.9 < found.low < 11.3 < 12.7 < found.high < 13.1
    assert estimate_start([100, 100], [40], 1, 20.0, spread=0.1, noise=0.1).high > found.high
    assert estimate_start([], [40], 2, 20.0).high == 0
    overtaken = estimate_start([], [40], 1, 20.0, [Overtaker(10, 1.0, math.inf)], noise=0.1)
    assert overtaken.seconds == pytest.approx(4)
    never = estimate_start([], [40], 1, 20.0, [Overtaker(30, 1.0, math.inf)])
    assert (never.seconds, never.high) == (10, None)
    for slots, rate in ((0, 1.0), (1, 0.0), (1, math.inf)):
        with pytest.raises(ValueError):
            estimate_start([], [], slots, rate)


@pytest.mark.parametrize("variance", [0.01, 0.1, 1.0])
def test_the_band_is_a_gamma_distributions(variance: float) -> None:
    drawn = np.random.default_rng(0).gamma(1 / variance, variance, 200_000)
    assert gamma_band(1.0, variance) == pytest.approx(np.quantile(drawn, [0.1, 0.9]), rel=0.08)


def foretell(load: ServeLoad) -> np.ndarray:
    """Estimated start, low, high, true start and stated length of each request that had to wait, estimated as it came."""
    arrivals, queue = draw_arrivals(load), BodyQueue(load.slots, max_waiting=None)
    times, lengths, stated = arrivals.times, arrivals.lengths, arrivals.stated
    running, starts, estimates, come = [], {}, {}, 0
    while come < len(times) or running:
        now = min(times[come] if come < len(times) else math.inf, running[0][0] if running else math.inf)
        while running and running[0][0] <= now:
            _, ended = heapq.heappop(running)
            queue.record_service(stated[ended], lengths[ended], now)
        if come < len(times) and times[come] <= now:
            queue.push(come, stated[come], now)
            come += 1
        while queue and len(running) < load.slots:
            starts[begun := queue.pop(now)] = now
            heapq.heappush(running, (now + lengths[begun], begun))
        if (last := come - 1) in queue and last > 200 and last not in estimates:
            left = [max(0.1 * stated[i], stated[i] - (now - starts[i])) for _, i in running]
            estimates[last] = estimate_start(queue.sizes_ahead(last, now), left, load.slots, 1.0, queue.overtakers(last, now))
    rows = [(e.seconds, e.low, e.high or math.inf, starts[i] - times[i], stated[i]) for i, e in estimates.items()]
    return np.array(rows)


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_a_simulated_queue_does_about_what_was_foretold(slots: int) -> None:
    """Without the newcomers' part the large ones would wait five times as long as they were told (4 slots)."""
    seconds, low, high, true, stated = foretell(ServeLoad(slots, 0.9, requests=6000)).T
    assert 0.6 < ((low <= true) & (true <= high)).mean() < 0.9
    for sizes in (stated < 1, (stated > 1) & (stated < 3)):
        assert 0.7 < true[sizes].mean() / seconds[sizes].mean() < 1.5
    assert 0.7 < true[stated > 3].mean() / seconds[stated > 3].mean() < 2
