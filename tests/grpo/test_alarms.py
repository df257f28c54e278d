"""Each alarm rings on a series that goes wrong; none rings on a noisy, healthy one.

`histories/` holds the alarm metrics of real runs of the bundled model (dev/LOG.md, entry 5): the three seeds of the demo and the run
of entry 7 are healthy, and one with the defaults of entry 22 (entry 26); one collapsed from step 80 on.
"""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from sbtiny.grpo.alarms import ALARM_STEPS, ALARMS, Alarms

EARLY = ALARM_STEPS // 2

HISTORIES = Path(__file__).parent / "histories"
HEALTHY = {
    "accuracy": 0.9,
    "budget_if_failed": 260.0,
    "length_if_wrong": 240.0,
    "text_outside_tags": 0.01,
    "malformed": 0.03,
    "frac_reward_zero_std_sampled": 0.1,
}
WRONG = {
    "budget inflation": {"budget_if_failed": 600.0},
    "wrong answers grow": {"length_if_wrong": 420.0},
    "text outside the tags": {"text_outside_tags": 0.3},
    "collapse of accuracy": {"accuracy": 0.3},
    "collapse of format": {"malformed": 0.8},
    "collapse of spread": {"frac_reward_zero_std_sampled": 1.0},
}


def healthy(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """Metrics of a good run: lengths fall to 40 % with 20 % noise; some steps have no wrong or unbounded answers."""
    rng = random.Random(seed)
    rows = []
    for step in range(steps):
        noise = rng.uniform(0.8, 1.2)
        row = {key: value * noise * (1 - 0.6 * step / steps) for key, value in HEALTHY.items()} | {"accuracy": 0.75 * noise}
        if step % 7 == 3:
            del row["budget_if_failed"], row["length_if_wrong"]
        rows.append(row | {"frac_reward_zero_std_sampled": rng.choice([0.0, 0.125, 0.25, 1.0])})
    return rows


def rung(rows: list[dict[str, float]], alarms: Alarms | None = None) -> list[tuple[int, str]]:
    alarms = alarms or Alarms()
    return [(step, alarm.name) for step, row in enumerate(rows) for alarm in alarms.feed(row)]


@pytest.mark.parametrize("seed", range(20))
def test_none_rings_on_a_healthy_run(seed: int) -> None:
    assert rung(healthy(300, seed)) == []


@pytest.mark.parametrize("name", [alarm.name for alarm in ALARMS])
def test_each_rings_once_after_twenty_steps_in_a_row(name: str) -> None:
    rows = healthy(30) + [HEALTHY | WRONG[name]] * 60
    assert rung(rows) == [(29 + ALARM_STEPS, name)]


def test_one_wild_value_at_the_start_does_not_deafen_it() -> None:
    rows = [HEALTHY | {"budget_if_failed": 60_000.0 if step == 3 else 260.0} for step in range(30)] + [
        HEALTHY | {"budget_if_failed": 600.0}
    ] * 30
    assert rung(rows) == [(29 + ALARM_STEPS, "budget inflation")]


@pytest.mark.parametrize("name", [alarm.name for alarm in ALARMS])
def test_one_good_step_begins_the_count_anew(name: str) -> None:
    bad = [HEALTHY | WRONG[name]] * (ALARM_STEPS - 1)
    assert rung([HEALTHY] * EARLY + [*bad, HEALTHY] * 4) == []


@pytest.mark.parametrize("name", ["collapse of format", "collapse of spread"])
def test_a_run_that_began_there_did_not_collapse(name: str) -> None:
    assert rung([HEALTHY | WRONG[name]] * 100) == []


def test_a_missing_metric_rings_nothing() -> None:
    assert rung([{"reward": 0.1}] * 100) == []
    assert rung([HEALTHY | {"budget_if_failed": float("nan")}] * 100) == []


@pytest.mark.parametrize("name", [alarm.name for alarm in ALARMS])
def test_the_state_survives_a_checkpoint(name: str) -> None:
    first, rows = Alarms(), [HEALTHY] * EARLY + [HEALTHY | WRONG[name]] * 10
    assert rung(rows, first) == []
    again = Alarms(**asdict(first))
    assert rung(rows[EARLY:], again) == [(9, name)]
    assert rung(rows[EARLY:], Alarms(**asdict(again))) == []


def test_every_cause_names_a_setting_to_change() -> None:
    assert all("grpo." in alarm.cause for alarm in ALARMS)
    assert {alarm.name for alarm in ALARMS if alarm.collapse} == {f"collapse of {what}" for what in ("accuracy", "format", "spread")}


def test_an_accuracy_that_never_was_cannot_collapse() -> None:
    assert rung([HEALTHY | {"accuracy": value} for value in [0.15] * EARLY + [0.0] * 60]) == []


@pytest.mark.parametrize("patience", [4, 5, 50])
def test_a_patience_of_ones_own_has_half_as_many_early_steps(patience: int) -> None:
    early = (patience + 1) // 2
    rows = [HEALTHY] * early + [HEALTHY | {"malformed": 0.9}] * 60
    assert rung(rows, Alarms(patience=patience)) == [(early + patience - 1, "collapse of format")]


def test_collapsing_follows_the_condition_of_a_collapse() -> None:
    alarms = Alarms()
    rung([HEALTHY] * EARLY, alarms)
    for row, collapsing in (
        (HEALTHY, False),
        (HEALTHY | {"malformed": 0.9}, True),
        (HEALTHY, False),
        (HEALTHY | {"text_outside_tags": 1.0}, False),
    ):
        rung([row], alarms)
        assert alarms.collapsing is collapsing


def history(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (HISTORIES / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", range(5))
def test_no_alarm_rings_on_a_real_healthy_run(run: int) -> None:
    rows = history(f"healthy-{run}")
    assert len(rows) == (120 if run == 4 else 180)
    assert rung(rows) == []


def test_the_real_collapse_is_seen_within_the_patience() -> None:
    """Its accuracy fell from 81 % to 0 at about step 80; format and spread stayed, so no other alarm rings."""
    ((step, name),) = rung(history("collapsed"))
    assert name == "collapse of accuracy"
    assert 80 + ALARM_STEPS - 10 <= step <= 80 + ALARM_STEPS + 10
