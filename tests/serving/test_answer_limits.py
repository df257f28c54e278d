"""Room for a head, of tokenizers that spell it in few pieces or in many."""

from pathlib import Path
from typing import Any

import pytest
from test_heads_first import SHORT, Line

import sbtiny
from sbtiny.budget.protocol import FORMATS, MAX_BUDGET, render_budget
from sbtiny.config import ServeSettings, Settings
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.session import Ticket
from sbtiny.serving.answer_limits import HEAD_MARGIN, count_head_tokens
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HEAD_ROWS


class SpellingPolicy(Policy):
    """Of a tokenizer that has a token for each character and for nothing longer."""

    def encode(self, text: str) -> list[int]:
        return [token for character in text for token in super(SpellingPolicy, self).encode(character)]


@pytest.fixture(scope="module")
def spelling(started: Path) -> Assistant:
    settings = Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=1 + HEAD_ROWS))
    policy = sbtiny.load(str(started), settings=settings).policy
    return Assistant(SpellingPolicy(policy.engine, policy.tokenizer, policy.form, policy.model), settings.serve)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_head_of_any_budget_has_room(tiny, form) -> None:
    policy = build_policy(*tiny, slots=1, form=form)
    spelled = SpellingPolicy(policy.engine, policy.tokenizer, form)
    for each in (policy, spelled):
        for budget in (1, 87, 999, 123_456, 808_080, MAX_BUDGET):
            longest = len(each.encode(render_budget(budget, form))) + len(each.encode(form.closing)) + 1
            assert longest <= count_head_tokens(each) - HEAD_MARGIN
    assert count_head_tokens(spelled) > 40


def write_body_without_end(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """Let every answer state 900 tokens, letter by letter, and then write digits until it is cut."""
    head, digit, append = policy.encode("<budget>900</budget><solution>"), policy.encode("7")[0], Ticket.append

    def append_scripted(ticket: Ticket, token: int, logprob: float | None, stops: Any) -> Any:
        at, is_cut = len(ticket.written), any(ticket.enforcer.injected)
        return append(ticket, token if is_cut else head[at] if at < len(head) else digit, logprob, stops)

    monkeypatch.setattr(Ticket, "append", append_scripted)


def test_a_head_of_many_tokens_takes_nothing_from_the_end_of_an_answer(spelling: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    write_body_without_end(monkeypatch, spelling.policy)
    for most in (150, 151, 170, 200):
        reply = spelling.begin([{"role": "user", "content": SHORT[0]}], spelling.defaults.__class__(max_tokens=most, temperature=0.0))
        answer = reply.wait()
        assert answer.stated == 900
        assert answer.stop_reason == "ceiling"
        limits = reply.body.enforcer.tracker.limits
        closing = len(spelling.policy.encode(spelling.policy.form.closing)) + 1
        assert 29 + limits.ceiling + limits.reserve + closing <= most  # 29 of the head


def test_a_head_of_many_tokens_waits_once_its_budget_stands(spelling: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(spelling)
    blocker = line.ask(SHORT[0], budget=300)
    write_body_without_end(monkeypatch, spelling.policy)
    line.step(2)
    replies = [line.ask(question) for question in SHORT[1:3]]
    line.step_until_waiting(*replies)
    assert [reply.stated for reply in replies] == [900, 900]
    for reply in (blocker, *replies):
        line.drop(reply)
    assert line.is_empty()
