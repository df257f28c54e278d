"""The bench of a running server: the same requests in three orders over a socket, at forced lengths and at the model's own."""

import json
import statistics
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from sbtiny.bench.serve import ORDERS, ServePlan, compute_figures, make_rank, make_requests, start_server
from sbtiny.bench.serve_client import RequestTiming, read_event, send_requests
from sbtiny.bench.serve_simulation import ServeLoad, draw_arrivals
from sbtiny.cli import main as cli
from sbtiny.config import ServeSettings, Settings
from sbtiny.errors import Failed, InputError
from sbtiny.serving.heads_first import HeadsFirst

SMALL = Settings(four_bit=False, serve=ServeSettings(context=512))
PLAN = ServePlan(ServeLoad(slots=1, load=None, sigma=0.6, requests=8, seed=3), draws_lengths=True, mean=24)


def test_the_command_measures_every_order_at_the_lengths_drawn(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, file = [], HeadsFirst._next_bodies

    def listen(self: HeadsFirst, now: float) -> list:
        bodies = file(self, now)
        begun.extend((self.rank, body) for body in bodies)
        return bodies

    monkeypatch.setattr(HeadsFirst, "_next_bodies", listen)
    words = "tiny --burst --slots 1 --requests 8 --sigma 0.6 --mean 24 --rounds 1 --seed 3 --threads 1 --json"
    monkeypatch.setattr(sys, "argv", ["sbtiny", "bench", "serve", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    result = json.loads(capsys.readouterr().out)
    assert (result["requests"], result["slots"], result["sigma"], result["load"]) == (8, 1, 0.6, None)
    assert list(result["orders"]) == list(ORDERS)
    assert result["unit"] == "seconds"
    drawn = [min(2000, max(4, round(24 * length))) for length in draw_arrivals(PLAN.load).lengths]
    assert result["mean_tokens"] == pytest.approx(statistics.mean(drawn), abs=0.5)
    stated = [max(1, round(24 * told)) for told in draw_arrivals(PLAN.load).stated]
    assert sorted(body.planned for rank, body in begun if rank is None) == sorted(stated)  # not what the drawn lengths would let stand
    ours = [body.budget for rank, body in begun if rank is None][2:]  # the first ones find the slot free, or wait for none yet
    assert len(ours) == 6
    assert sum(a <= b for a, b in pairwise(ours)) >= 4  # those that come late may be shorter
    assert set(result["orders"]["ours"]) == {*result["orders"]["fcfs"], "over_fcfs", "simulated_over_fcfs"}
    for order in ORDERS:
        figures = result["orders"][order]
        assert 0 < figures["budget_p50"] <= figures["budget_p99"] < figures["longest"]
        assert figures["p50"] <= figures["p99"] <= figures["longest"]
        assert figures["tokens_per_second"] > 0
        assert 0.3 < figures["busy"] <= 1.05  # all came at once: the slot is hardly ever free, and times in it overlap with no wait
    assert result["orders"]["oracle"]["simulated_over_fcfs"]["mean"]["median"] < 1


def test_requests_are_seeded_and_own_lengths_are_left_to_the_model() -> None:
    arrivals = draw_arrivals(PLAN.load)
    bodies, drawn = make_requests(PLAN, arrivals)
    assert (bodies, drawn) == make_requests(PLAN, arrivals)
    assert len({body["seed"] for body in bodies}) == len(drawn) == 8
    assert not any("max_tokens" in body for body in bodies)  # it would cap the budget, and tell the queue the true length
    own, none = make_requests(replace(PLAN, draws_lengths=False), arrivals)
    assert not none
    assert not any({"budget", "max_tokens"} & body.keys() for body in own)


def test_ranks_of_the_orders() -> None:
    class Asked:
        budget, started = 7, 3.5

        class ask:
            seed = 11

    assert make_rank("ours", {}) is None
    assert make_rank("fcfs", {})(Asked) == 3.5
    assert make_rank("oracle", {11: 40})(Asked) == 40


def test_figures_by_hand() -> None:
    timings = [RequestTiming(10.0, 10.5, 12.0, 0.25, 1.0, 30), RequestTiming(11.0, 11.1, 15.0, 2.0, 2.0, 70)]
    figures = compute_figures(timings, 2)
    assert (figures["mean"], figures["longest"], figures["longest_wait"]) == (3.0, 4.0, 2.0)
    assert (figures["tokens_per_second"], figures["busy"]) == (20.0, 0.3)
    assert figures["budget_p50"] == pytest.approx(0.3)


def test_events_are_read() -> None:
    timing = RequestTiming(0.0)
    read_event(timing, 'data: {"budget":{"predicted":12,"requested":null},"choices":[]}')
    assert (timing.stated, timing.budget_at > 0) == (12, True)
    read_event(timing, 'data: {"metrics":{"queue_time_ms":500.0},"timings":{"predicted_ms":1500.0},"usage":null}')
    assert (timing.queued, timing.service) == (0.5, 1.5)
    read_event(timing, 'data: {"usage":{"completion_tokens":9}}')
    assert timing.tokens == 9
    assert timing.ended > timing.budget_at


def test_a_refused_request_and_a_model_that_cannot_be_loaded_are_told() -> None:
    with start_server("tiny", SMALL, slots=1, most_waiting=1) as (url, _), pytest.raises(Failed, match="the server answered 400"):
        send_requests(url, [{"messages": []}], [0.0])
    with pytest.raises(InputError, match="no-such-model"), start_server("no-such-model", SMALL, 1, 1):
        pass
