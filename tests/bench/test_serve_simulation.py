"""The simulated queue: against the exact formulas for one slot, the table of the contract, ageing, and the command."""

import json
import math
import statistics
import sys
from dataclasses import replace

import numpy as np
import pytest

from sbtiny.bench.serve_simulation import Arrivals, ServeLoad, compare_orders, draw_arrivals, measure, simulate
from sbtiny.cli import main as cli
from sbtiny.serving.queue import rank_first_come, rank_oracle, rank_shortest_stated


def test_a_queue_by_hand() -> None:
    arrivals = Arrivals([0.0, 1.0, 2.0, 2.5], [4.0, 3.0, 1.0, 2.0], [4.0, 3.0, 1.5, 1.0])
    expected = {rank_first_come: [4, 6, 6, 7.5], rank_oracle: [4, 9, 3, 4.5], rank_shortest_stated: [4, 9, 5, 3.5]}
    for rank, times in expected.items():
        assert simulate(arrivals, 1, rank, 0.0)[0].tolist() == times
    assert simulate(arrivals, 4, rank_oracle, 0.0)[0].tolist() == arrivals.lengths
    assert simulate(arrivals, 1, rank_shortest_stated, 100.0)[0].tolist() == [4, 6, 6, 7.5]  # strong ageing is first come first served


def test_all_at_once_are_filed_before_one_starts() -> None:
    arrivals = Arrivals([0.0] * 3, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0])
    assert simulate(arrivals, 1, rank_shortest_stated, None)[1].tolist() == [3, 1, 0]


def test_arrivals_are_seeded_and_as_asked() -> None:
    load = ServeLoad(4, 0.8, 0.7, 100_000, seed=3)
    drawn = draw_arrivals(load)
    assert drawn == draw_arrivals(load)
    assert np.mean(drawn.lengths) == pytest.approx(1, abs=0.02)
    assert np.std(np.log(drawn.lengths)) == pytest.approx(0.7, abs=0.01)
    assert np.std(np.log(drawn.stated) - np.log(drawn.lengths)) == pytest.approx(0.21, abs=0.01)
    assert sum(drawn.lengths) / drawn.times[-1] == pytest.approx(0.8 * 4, rel=0.02)


def exact_mean(load: float, sigma: float, shortest: bool) -> float:
    """Mean time in a one-slot system: Pollaczek and Khinchine's for first come, Cobham's for shortest first, lengths of mean 1."""
    started = load * math.exp(sigma**2) / 2  # what is left, seen by a newcomer
    if not shortest:
        return 1 + started / (1 - load)
    z = np.linspace(-6, 6, 20_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    shorter = np.cumsum(density * np.exp(sigma * z - sigma**2 / 2)) * (z[1] - z[0])  # mean length of those up to here
    return 1 + float(np.sum(density * started / (1 - load * shorter) ** 2) * (z[1] - z[0]))


@pytest.mark.parametrize(("load", "sigma"), [(0.7, 0.5), (0.7, 1.0), (0.9, 0.5)])
def test_one_slot_has_the_exact_means(load: float, sigma: float) -> None:
    arrivals = draw_arrivals(ServeLoad(1, load, sigma, 150_000, seed=1))
    assert simulate(arrivals, 1, rank_first_come, 0.0)[0].mean() == pytest.approx(exact_mean(load, sigma, False), rel=0.05)
    assert simulate(arrivals, 1, rank_oracle, 0.0)[0].mean() == pytest.approx(exact_mean(load, sigma, True), rel=0.05)


# The table of shared/serving.md, section 4: slots, load, sigma, mean over first come first served without ageing. Its figures are of one
# draw each. Ours are medians of several; at sigma 1 and 1.5 the mean of first come hangs on the few longest of 60,000, and the ratio moves
# by 0.05 and more. With a million requests it is 0.36, 0.53, 0.82 at sigma 1 and 0.21, 0.26, 0.55 at sigma 1.5; exact for an oracle on one
# slot: 0.343 and 0.197.
TABLE = [
    (1, 0.9, 1.0, 0.42), (4, 0.9, 1.0, 0.61), (16, 0.9, 1.0, 0.87), (64, 0.9, 1.0, 0.98), (1, 0.7, 1.0, 0.68), (4, 0.7, 1.0, 0.89),
    (1, 0.9, 1.5, 0.31), (4, 0.9, 1.5, 0.32), (16, 0.9, 1.5, 0.67), (1, 0.9, 0.5, 0.71), (4, 0.9, 0.5, 0.80), (16, 0.9, 0.5, 0.94),
]  # fmt: skip
SHORT = [(4, None, 0.53), (16, None, 0.57), (48, None, 0.67), (16, 1.2, 0.25), (48, 1.2, 0.42)]  # slots, load, ratio


def ratio(load: ServeLoad, ageing: float | None, rounds: int) -> float:
    """Mean time of our order over that of first come first served, median over the rounds."""
    found = []
    for seed in range(rounds):
        arrivals = draw_arrivals(replace(load, seed=seed))
        ours, fcfs = (simulate(arrivals, load.slots, *how)[0] for how in ((rank_shortest_stated, ageing), (rank_first_come, 0.0)))
        found.append(ours.mean() / fcfs.mean())
    return statistics.median(found)


@pytest.mark.parametrize(("slots", "load", "told"), SHORT)
def test_bursts_and_overload_are_as_in_the_table(slots: int, load: float | None, told: float) -> None:
    asked = ServeLoad(slots, load, requests=2000 if load else 400)
    orders = compare_orders(asked, 12)["orders"]
    assert orders["ours_without_ageing"]["over_fcfs"]["mean"]["median"] == pytest.approx(told, abs=0.04)
    assert orders["ours"]["over_fcfs"]["mean"]["median"] == pytest.approx(told, abs=0.08)
    assert orders["ours_without_ageing"]["mean"] < 1.1 * orders["oracle"]["mean"]


@pytest.mark.parametrize(("slots", "load", "sigma", "told"), [TABLE[i] for i in (2, 5, 11)])
def test_a_steady_load_is_as_in_the_table(slots: int, load: float, sigma: float, told: float) -> None:
    assert ratio(ServeLoad(slots, load, sigma, 40_000), None, 3) == pytest.approx(told, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "load", "sigma", "told"), TABLE)
def test_the_whole_table(slots: int, load: float, sigma: float, told: float) -> None:
    assert ratio(ServeLoad(slots, load, sigma), 0.0, 5) == pytest.approx(told, abs=0.11)


def test_ageing_costs_part_of_the_gain_and_takes_from_the_longest_wait() -> None:
    arrivals = draw_arrivals(load := ServeLoad(1, 0.9, requests=60_000, seed=100, ageing=0.05))
    default, aged = (measure(arrivals, ServeLoad(1, 0.9, ageing=c)) for c in (None, load.ageing))
    free, fcfs = aged["ours_without_ageing"], aged["fcfs"]
    assert fcfs["mean"] > aged["ours"]["mean"] > default["ours"]["mean"] > free["mean"] > aged["oracle"]["mean"]
    assert aged["ours"]["longest_wait"] < default["ours"]["longest_wait"] < free["longest_wait"]
    assert fcfs["mean"] - aged["ours"]["mean"] > 0.85 * (fcfs["mean"] - free["mean"])


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sbtiny", "bench", "serve", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr()
    return left.value.code or 0, shown.out, shown.err


def test_the_command(capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "--simulate", "--slots", "4", "--requests", "500", "--rounds", "2", "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["slots"], result["load"], result["requests"], result["rounds"]) == (4, 0.9, 500, 2)
    assert list(result["orders"]) == ["fcfs", "ours", "ours_without_ageing", "oracle"]
    assert set(result["orders"]["ours"]) == {"mean", "p50", "p99", "longest", "longest_wait", "over_fcfs"}
    code, out, _ = run(capsys, monkeypatch, "--simulate", "--burst", "--rounds", "1")
    assert code == 0
    assert "400 requests, all at once" in out


def test_what_the_command_refuses(capsys, monkeypatch) -> None:
    code, _, said = run(capsys, monkeypatch)
    assert code == 2
    assert "give a run or a model to serve, or --simulate" in said
    code, _, said = run(capsys, monkeypatch, "tiny", "--ageing", "1")
    assert code == 2
    assert "--ageing is for --simulate" in said
    code, _, said = run(capsys, monkeypatch, "--simulate", "--burst", "--load", "0.5")
    assert code == 2
    assert "exclude each other" in said


def test_with_so_many_slots_that_nobody_waits_the_orders_are_alike() -> None:
    result = compare_orders(ServeLoad(1024, 0.5, 1.0, 3000))
    assert result["orders"]["ours"]["longest_wait"] == 0
    assert all(ratio["median"] == 1 for ratio in result["orders"]["ours"]["over_fcfs"].values())


def test_lengths_may_be_those_of_real_answers() -> None:
    arrivals = draw_arrivals(ServeLoad(requests=2000, answer_lengths=(10, 20, 90)))
    assert {round(40 * length) for length in arrivals.lengths} == {10, 20, 90}
    assert 0.9 < sum(arrivals.lengths) / 2000 < 1.1
    other = draw_arrivals(ServeLoad(requests=2000, answer_lengths=(10, 20, 90), seed=1))
    assert arrivals.lengths != other.lengths
