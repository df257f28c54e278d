"""What the decoder tells first of an answer that waits: its place, and seconds with the wait in them."""

from typing import Any

import pytest
from serve_support import SLOTS, load_thinking, load_tiny, script_answers

from sbtiny.budget.protocol import BudgetChoice
from sbtiny.serving.ask import Ask
from sbtiny.serving.decoder import Decoder
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.serving.job import Job
from sbtiny.serving.requests import ServeRequest
from sbtiny.tasks import arithmetic

QUESTIONS = [q.question for q in arithmetic.generate_questions("val", 20)]


def begin(decoder: Decoder, at: int, mode: str = "fixed", value: float = 60.0) -> Job:
    ask = Ask(choice=BudgetChoice(mode, value), temperature=0.0, max_tokens=300)
    job = Job(ServeRequest(ask=ask, messages=({"role": "user", "content": QUESTIONS[at]},)), begun=None)
    decoder.begin(job)
    return job


def first_budgets(decoder: Decoder, jobs: list[Job]) -> list[dict[str, Any]]:
    """The first budget object that each is told."""
    found: dict[Job, dict[str, Any]] = {}
    for _ in range(60):
        decoder.turn()
        for job, update in decoder.take_news():
            if update.budget is not None:
                found.setdefault(job, update.budget)
        if all(job in found for job in jobs):
            return [found[job] for job in jobs]
    raise AssertionError("they were not told a budget")


def test_the_first_budget_of_one_that_waits_counts_its_wait() -> None:
    """Also where more come at once than heads have rows."""
    decoder = Decoder(load_tiny()(), 64)
    running = [begin(decoder, i) for i in range(SLOTS)]
    assert [budget["queue_position"] for budget in first_budgets(decoder, running)] == [0] * SLOTS
    for _ in range(10):
        decoder.turn()
    waiting = [begin(decoder, SLOTS + i) for i in range(HEAD_ROWS + 2)]
    budgets = first_budgets(decoder, waiting)
    assert sorted(budget["queue_position"] for budget in budgets[:HEAD_ROWS]) == list(range(1, HEAD_ROWS + 1))
    assert [budget["queue_position"] for budget in budgets[HEAD_ROWS:]] == [HEAD_ROWS + 1, HEAD_ROWS + 2]
    alone = [job.reply.progress().seconds.seconds for job in waiting]
    assert all(budget["eta_seconds"] > seconds for budget, seconds in zip(budgets, alone, strict=True))


def test_one_of_a_factor_is_told_its_place_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body begins anew once the stated budget stands."""
    decoder = Decoder(load_thinking()(), 64)
    script_answers(monkeypatch, decoder.assistant.policy, "<budget>40</budget>")
    running = [begin(decoder, i, value=90.0) for i in range(SLOTS)]
    first_budgets(decoder, running)
    (budget,) = first_budgets(decoder, [begin(decoder, SLOTS, "scaled", 2.0)])
    assert (budget["predicted"], budget["queue_position"]) == (40, 1)
