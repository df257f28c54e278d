"""The order of waiting bodies: by hand, against a sort over anything, its bounds, and that nobody starves."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.serving.queue import MIB, BodyQueue, Overtaker, QueueFull, rank_first_come, rank_oracle, rank_shortest_stated

Sizes = st.integers(1, 2000)
Steps = st.lists(st.tuples(st.sampled_from(("push", "pop", "remove", "wait")), Sizes, st.integers(-1, 1), st.integers(0, 100)), max_size=60)


def filled(stated: list[float], **how) -> BodyQueue:
    queue = BodyQueue(**how)
    for item, size in enumerate(stated):
        queue.push(item, size, now=0.0)
    return queue


def drain(queue: BodyQueue, now: float = 0.0) -> list:
    return [queue.pop(now) for _ in range(len(queue))]


def test_it_needs_no_torch() -> None:
    code = "import sys, sbtiny.serving.queue, sbtiny.serving.eta, sbtiny.serving.requests; assert not {'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shortest_goes_first_and_equals_in_the_order_they_came() -> None:
    assert drain(filled([30, 10, 20, 10])) == [1, 3, 2, 0]


def test_priority_goes_before_size_and_lower_is_earlier() -> None:
    queue = filled([10])
    queue.push("late", 1, 0.0, priority=1)
    queue.push("urgent", 500, 0.0, priority=-1)
    assert drain(queue) == ["urgent", 0, "late"]


def test_one_that_waited_long_enough_goes_before_a_shorter_one() -> None:
    for wait, first in ((19.0, "short"), (21.0, "long")):
        queue = BodyQueue(ageing=2.0)
        queue.push("long", 50, 0.0)
        queue.push("short", 10, wait)
        assert queue.pop(wait) == first


def test_places_and_sizes_ahead() -> None:
    queue = filled([30, 10, 20])
    assert [queue.position(i, 0.0) for i in range(3)] == [3, 1, 2]
    assert [queue.sizes_ahead(i, 0.0) for i in range(3)] == [[10, 20], [], [10]]
    queue.remove(1)
    assert 1 not in queue
    assert [queue.position(i, 0.0) for i in (0, 2)] == [2, 1]
    for ask in (queue.position, queue.sizes_ahead, queue.overtakers):
        with pytest.raises(KeyError):
            ask(1, 0.0)
    with pytest.raises(KeyError):
        queue.remove(1)


def test_wrong_use() -> None:
    queue = filled([1])
    with pytest.raises(ValueError, match="waits already"):
        queue.push(0, 5, 0.0)
    assert queue.pop(3.0) == 0
    with pytest.raises(IndexError):
        queue.pop(3.0)
    with pytest.raises(ValueError, match="went back"):
        queue.push(0, 5, 2.0)


def test_ageing_follows_what_is_measured() -> None:
    """A mean body has aged by its size after SERVICES_TO_AGE mean services; the old half of a waiting time counts at the old c."""
    queue = BodyQueue()
    queue.push("early", 100, 0.0)
    assert (queue.ageing, queue.mean_seconds) == (0.0, None)
    queue.record_service(200, 10.0, 5.0)
    assert (queue.ageing, queue.mean_stated, queue.mean_seconds) == (0.4, 200, 10.0)
    queue.push("late", 97, 15.0)  # the early one has aged by 4
    assert queue.position("early", 15.0) == 1
    queue.record_service(200, 90.0, 15.0)
    assert queue.ageing == pytest.approx(0.08, rel=0.01)
    assert queue.position("early", 99.0) == 1
    assert BodyQueue(ageing=0.5).ageing == 0.5


def test_a_head_without_a_budget_counts_as_the_mean() -> None:
    queue = BodyQueue()
    queue.record_service(100, 1.0, 0.0)
    for item, size in (("long", 101), ("none", None), ("short", 99)):
        queue.push(item, size, 0.0)
    assert drain(queue) == ["short", "none", "long"]


def test_the_bound_by_count_says_when_to_come_again() -> None:
    queue = BodyQueue(slots=2, max_waiting=2)
    queue.record_service(100, 30.0, 0.0)
    queue.push(0, 5, 0.0)
    queue.check_room(bodies=1)
    with pytest.raises(QueueFull):
        queue.check_room(bodies=2)  # one that is decoding its head counts too
    queue.push(1, 5, 0.0)
    with pytest.raises(QueueFull, match="2 requests wait") as full:
        queue.push(2, 5, 0.0)
    assert full.value.retry_after == 15  # one of two slots is free after half a service
    assert 2 not in queue
    queue.pop(0.0)
    queue.push(2, 5, 0.0)


def test_the_bound_by_kept_memory() -> None:
    queue = BodyQueue(max_bytes=10 * MIB)
    for item in range(3):
        queue.push(item, 5, 0.0, kept_bytes=3 * MIB)
    with pytest.raises(QueueFull, match="keep 9 MiB") as full:
        queue.push(3, 5, 0.0, kept_bytes=6 * MIB)
    assert full.value.retry_after == 2  # two must leave; nothing is measured yet
    with pytest.raises(QueueFull, match="keep 9 MiB of 10") as full:
        queue.push(3, 5, 0.0, kept_bytes=11 * MIB)  # not even alone: until all have left and a slot is free
    assert full.value.retry_after == 4
    queue.remove(1)
    queue.push(3, 5, 0.0, kept_bytes=4 * MIB)
    assert queue.kept_bytes == 10 * MIB
    drain(queue)
    assert queue.kept_bytes == 0


def test_those_that_may_still_overtake() -> None:
    queue = BodyQueue(ageing=2.0)
    queue.push("small", 10, 0.0)
    queue.push("urgent", 90, 0.0, priority=-1)
    queue.push("mine", 50, 10.0)
    queue.push("large", 60, 10.0)
    assert queue.overtakers("mine", 10.0) == [Overtaker(10, 0.1, 20.0), Overtaker(90, 0.1, math.inf)]
    assert queue.overtakers("mine", 20.0) == [Overtaker(10, 0.05, 10.0), Overtaker(90, 0.05, math.inf)]


def test_after_a_burst_fewer_newcomers_are_foreseen() -> None:
    queue = BodyQueue(max_waiting=None)
    for item in range(100):
        queue.push(item, 10 + item, now=item / 1000)
    assert queue.overtakers(99, 0.1)[0].per_second == pytest.approx(10)
    after = queue.overtakers(99, 5.0)
    assert sum(one.per_second for one in after) == pytest.approx(0.6, rel=0.1)  # nobody came for five seconds


@given(Steps, st.sampled_from([0.0, 0.25, 1.0, 16.0]))  # sums without rounding: equals stay equals
def test_it_is_a_sort_by_stated_less_age(steps: list, ageing: float) -> None:
    """Any mix of comings, goings and clock ticks: the places are those of a plain sort, and stay so."""
    queue, now, model, count = BodyQueue(max_waiting=20, ageing=ageing), 0.0, {}, 0
    queue.record_service(1, 1, now)  # starts the clock
    for action, size, priority, later in steps:
        now += later
        order = sorted(model, key=model.get)
        if action == "push" and len(model) < 20:
            queue.push(count, size, now, priority, kept_bytes=size)
            model[count] = (priority, size + ageing * now, count, size)
            count += 1
        elif action == "push":
            with pytest.raises(QueueFull):
                queue.push(count, size, now, priority)
        elif order and action == "pop":
            assert queue.pop(now) == order[0]
            del model[order[0]]
        elif order and action == "remove":
            gone = order[size % len(order)]
            queue.remove(gone)
            del model[gone]
        order = sorted(model, key=model.get)
        assert [queue.position(item, now) for item in order] == list(range(1, len(order) + 1))
        assert len(queue) == len(order)
        assert queue.kept_bytes == sum(model[item][3] for item in order)
        if order:
            assert queue.sizes_ahead(order[-1], now) == [model[item][3] for item in order[:-1]]
    assert drain(queue, now) == sorted(model, key=model.get)


@given(st.lists(st.tuples(Sizes, st.floats(0, 20)), min_size=2, max_size=40), st.floats(0.1, 50.0))
def test_nobody_is_overtaken_by_those_who_come_much_later(bodies: list, ageing: float) -> None:
    """One of s tokens goes before all that come s / c seconds after it or later: its wait is bounded, whatever comes."""
    queue, now, come = BodyQueue(ageing=ageing), 0.0, []
    for item, (size, later) in enumerate(bodies):
        now += later
        queue.push(item, size, now)
        come.append(now)
    order = drain(queue, now)
    for place, early in enumerate(order):
        for other in order[:place]:  # went before it
            assert come[other] - come[early] <= bodies[early][0] / ageing + 1e-6


def test_orders_of_the_bench() -> None:
    stated, length, arrival = 3.0, 2.0, 7.0
    assert [rank(stated, length, arrival) for rank in (rank_first_come, rank_shortest_stated, rank_oracle)] == [7.0, 3.0, 2.0]
