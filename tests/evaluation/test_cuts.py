"""Answers cut below their budget: where, what is injected, and one command for the accuracy at each share."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sbtiny.budget.metrics import Sample
from sbtiny.budget.protocol import SOLUTION, THINK, BudgetChoice
from sbtiny.cli import main as cli
from sbtiny.config import EvalSettings, ServeSettings
from sbtiny.evaluation import cuts
from sbtiny.evaluation.evaluate import evaluate, limits_for, score_answer
from sbtiny.rollout.episode import Episode, Request, read_episode
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.serving.answer_limits import Limiter
from sbtiny.tasks import arithmetic
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import auto

E = EvalSettings(max_tokens=120, reserve=32)
ASKED = arithmetic.generate_questions("val", 6)


@pytest.mark.parametrize(
    ("cut", "ceiling", "budget", "expected"),
    [(0.5, 0, 80, 40), (0.25, 0, 3, 1), (0.0, 30, 80, 30), (0.5, 30, 80, 30), (0.5, 30, 40, 20), (0.5, 30, None, 30)],
)
def test_where_an_answer_is_cut(policy: Policy, cut: float, ceiling: int, budget: int | None, expected: int) -> None:
    limits = limits_for(policy, replace(E, cut_at=cut, ceiling=ceiling), budget)
    assert (limits.ceiling, limits.wrap_up, limits.reserve) == (expected, tuple(policy.encode(SOLUTION.wrap_up)), 32)


@pytest.mark.parametrize(("cut", "ceiling", "budget"), [(0.0, 0, 80), (0.5, 0, None)])
def test_when_it_is_not(policy: Policy, cut: float, ceiling: int, budget: int | None) -> None:
    assert limits_for(policy, replace(E, cut_at=cut, ceiling=ceiling), budget) is None


def test_thoughts_that_are_cut_are_closed_as_in_chat_and_server(tiny: tuple) -> None:
    thinker = build_policy(*tiny, form=THINK)
    limits = limits_for(thinker, EvalSettings(ceiling=20), None)
    assert thinker.tokenizer.decode(limits.wrap_up).rstrip().endswith(THINK.closing)
    assert limits.reserve == Limiter(thinker, ServeSettings(), context=2048).reserve


def test_a_share_of_a_given_budget_and_a_ceiling_cut_where_they_say(policy: Policy) -> None:
    """The bundled model states no budget but answers after a given one."""
    wrap_up = policy.encode(SOLUTION.wrap_up)
    for changed in ({"cut_at": 0.5}, {"ceiling": 20}):
        episodes, samples = evaluate(policy, ASKED, auto, BudgetChoice("fixed", 40.0), replace(E, **changed), seed=0)
        assert all(e.stop_reason == "ceiling" for e in episodes)
        for e in episodes:
            assert e.completion_ids[20 : 20 + len(wrap_up)] == wrap_up
            assert e.injected[:20] + e.injected[20 + len(wrap_up) :] == [False] * (len(e.injected) - len(wrap_up))
        assert all(s.length <= 20 + E.reserve for s in samples)


def test_uncut_answers_come_first_then_each_share_in_both_ways(policy: Policy) -> None:
    asked: list[tuple[float, bool]] = []

    def one(**changed: Any) -> tuple[dict, list[Episode], list[Sample]]:
        settings = replace(E, **changed)
        asked.append((settings.cut_at, settings.wrap_up is None))
        episodes, samples = evaluate(policy, ASKED, auto, BudgetChoice("fixed", 40.0), settings, seed=0)
        if settings.wrap_up == "":
            assert all(len(e.completion_ids) == 40 * settings.cut_at and not any(e.injected) for e in episodes if not e.ended)
        return {"cut": settings.cut_at}, episodes, samples

    rows = cuts.evaluate_cuts(one, ASKED, auto)
    rates = [row["cut_rate"] for row in rows]
    assert rates == sorted(rates)
    assert [rates[0], *rates[3:]] == [0, 1, 1]
    assert [row["plain"]["cut_rate"] for row in rows[1:]] == rates[1:]
    assert rows[0]["plain"] is None
    assert asked == [(0.0, True), *((share, kind) for share in (1.0, 0.75, 0.5, 0.25) for kind in (True, False))]


def test_a_plain_cut_is_judged_by_what_is_there() -> None:
    """An answer that stands in its box when it is cut is right, though it never ended."""
    asked = [Question("0", "3 + 4?", "7"), Question("1", "3 + 5?", "8")]
    text = "<budget>20</budget><solution>3 + 4 = \\boxed{7}, so"
    cut = [read_episode(Request((1,), 9, prefill=text), [0], ["."], "ceiling")] * 2

    def one(**changed: Any) -> tuple[dict, list[Episode], list[Sample]]:
        return {}, cut, [score_answer(q, e, auto) for q, e in zip(asked, cut, strict=True)]

    rows = cuts.evaluate_cuts(one, asked, auto)
    assert [row["plain"]["accuracy"] for row in rows[1:]] == [0.5] * 4


def test_a_loop_that_ran_to_the_end_is_wrong_in_every_row() -> None:
    """It has its answer in a box too, and no cut ended it."""
    asked = [Question("0", "3 + 4?", "7")]
    looped = [read_episode(Request((1,), 9, prefill="<budget>20</budget><solution>\\boxed{7}, so"), [0], ["."], "length")]

    def one(**changed: Any) -> tuple[dict, list[Episode], list[Sample]]:
        samples = [score_answer(q, e, auto) for q, e in zip(asked, looped, strict=True)]
        return {"accuracy": float(samples[0].correct)}, looped, samples

    rows = cuts.evaluate_cuts(one, asked, auto)
    assert [row["accuracy"] for row in [*rows, *(row["plain"] for row in rows[1:])]] == [0] * 9


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
    assert [(row["budget"], row["cut"]) for row in found] == [("1x", share) for share in (0.0, 1.0, 0.75, 0.5, 0.25)]
    assert found[0]["cut_rate"] == 0 < found[4]["cut_rate"] == found[4]["plain"]["cut_rate"]
    assert all(row["plain"]["accuracy"] <= found[0]["accuracy"] for row in found[1:])  # the same answers, ended earlier
    shown = capsys.readouterr().out
    assert all(f"\n{100 * cut:.0f} % " in shown for cut in cuts.CUT_SHARES)
    assert all(f"{100 * row['accuracy']:.1f}" in shown for row in (found[4], found[4]["plain"]) if row["accuracy"])
