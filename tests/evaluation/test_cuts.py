"""Answers cut below their budget: where, what is injected, and one command for the accuracy at each share."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.budget.protocol import BudgetChoice
from sbtiny.cli import main as cli
from sbtiny.config import EvalSettings
from sbtiny.evaluation import cuts
from sbtiny.evaluation.evaluate import evaluate, limits_for
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto

E = EvalSettings(max_tokens=120, reserve=32)
ASKED = arithmetic.generate_questions("val", 6)


@pytest.mark.parametrize(
    ("cut", "ceiling", "budget", "expected"),
    [(0.5, 0, 80, 40), (0.25, 0, 3, 1), (0.0, 30, 80, 30), (0.5, 30, 80, 30), (0.5, 30, 40, 20), (0.5, 30, None, 30)],
)
def test_where_an_answer_is_cut(cut: float, ceiling: int, budget: int | None, expected: int) -> None:
    assert limits_for(replace(E, cut_at=cut, ceiling=ceiling), budget, ()).ceiling == expected


@pytest.mark.parametrize(("cut", "ceiling", "budget"), [(0.0, 0, 80), (0.5, 0, None)])
def test_when_it_is_not(cut: float, ceiling: int, budget: int | None) -> None:
    assert limits_for(replace(E, cut_at=cut, ceiling=ceiling), budget, ()) is None


def test_a_share_of_a_given_budget_and_a_ceiling_cut_where_they_say(policy: Policy) -> None:
    """The bundled model states no budget but answers after a given one."""
    wrap_up = policy.encode(E.wrap_up)
    for changed in ({"cut_at": 0.5}, {"ceiling": 20}):
        episodes, samples = evaluate(policy, ASKED, auto, BudgetChoice("fixed", 40.0), replace(E, **changed), seed=0)
        assert all(e.stop_reason == "ceiling" for e in episodes)
        for e in episodes:
            assert e.completion_ids[20 : 20 + len(wrap_up)] == wrap_up
            assert e.injected[:20] + e.injected[20 + len(wrap_up) :] == [False] * (len(e.injected) - len(wrap_up))
        assert all(s.length <= 20 + E.reserve for s in samples)


def test_the_uncut_answers_come_first_and_the_cut_ones_are_counted(policy: Policy) -> None:
    asked: list[float] = []

    def one(share: float) -> tuple[dict, list]:
        asked.append(share)
        settings = replace(E, cut_at=share)
        return {"cut": share}, evaluate(policy, ASKED, auto, BudgetChoice("fixed", 40.0), settings, seed=0)[0]

    rates = [row["cut_rate"] for row in cuts.evaluate_cuts(one)]
    assert rates == sorted(rates)
    assert [rates[0], *rates[2:]] == [0, 1, 1]
    assert asked == [0.0, 0.75, 0.5, 0.25]


def test_one_command_for_all_of_it(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(started, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sbtiny", "eval", "run", "--cuts", "--limit", "8", "--set", "eval.max_tokens=80"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    found = json.loads((tmp_path / "run" / "cuts.json").read_text())
    assert [(row["budget"], row["cut"]) for row in found] == [("1x", 0.0), ("1x", 0.75), ("1x", 0.5), ("1x", 0.25)]
    assert found[0]["cut_rate"] == 0 < found[3]["cut_rate"]
    shown = capsys.readouterr().out
    assert all(f"{cut:.0%} of its budget" in shown for cut in cuts.CUT_SHARES)
    assert f"{found[3]['accuracy']:.1%}" in shown
