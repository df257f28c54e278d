"""Room for a head, of tokenizers that spell it in few pieces or in many; what a model is told of a budget that it cannot have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_support import load_thinking, load_tiny, script_answers
from test_heads_first import SHORT, Line

import sbtiny
from sbtiny.budget.protocol import FORMATS, MAX_BUDGET, BudgetChoice, render_budget
from sbtiny.config import ServeSettings, Settings
from sbtiny.errors import InputError
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.session import Ticket
from sbtiny.serving.answer_limits import HEAD_MARGIN, LEAST_ANSWER, count_head_tokens
from sbtiny.serving.ask import Ask
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.serving.reply import Reply


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


def begin(assistant: Assistant, mode: str, value: float | None, **ask: Any) -> Reply:
    choice = Ask(choice=BudgetChoice(mode, value), temperature=0.0, **ask)
    return assistant.begin([{"role": "user", "content": SHORT[0]}], choice)


@pytest.mark.parametrize(
    ("mode", "value", "ask"),
    [
        ("fixed", 5000.0, {"max_tokens": 200}),
        ("fixed", 2000.0, {"ceiling": 100}),
        ("seconds", 1e6, {"ceiling": 100}),
        ("scaled", 4.0, {"max_tokens": 200}),
    ],
)
def test_a_budget_above_what_an_answer_may_take_is_told_as_that(
    mode: str, value: float, ask: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = load_thinking()()
    script_answers(monkeypatch, assistant.policy, "<budget>900</budget>")
    reply = begin(assistant, mode, value, **ask)
    while reply.body is None:
        assistant.step_each()
    assert reply.given == reply.planned == reply.allowed <= min(ask.values())
    assert reply.body.request.prefill == f"<budget>{reply.given}</budget><think>"
    assert reply.progress().left == reply.given
    assistant.drop(reply)


def test_a_stated_budget_above_the_ceiling_counts_no_more_than_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = load_thinking(ceiling=50)()
    line = Line(assistant)
    script_answers(monkeypatch, assistant.policy, "<budget>900</budget><think>" + "a) sells 1\n" * 30)
    blockers = [line.ask(question, budget=40) for question in SHORT[: line.bodies.slots]]
    line.step(2)
    stated, last = line.ask(SHORT[5]), line.ask(SHORT[6], budget=9, priority=1)
    line.step_until_waiting(stated, last)
    assert stated.stated == 900
    assert line.queue.sizes_ahead(last, float(line.now)) == [50]
    assert stated.progress().left == 50 + 60
    for reply in (*blockers, stated, last):
        line.drop(reply)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("budget", "ceiling", "told", "allowed"), [(10, None, 10, 11), (900, 9, 9, 9), (None, 12, 12, 12), (1, None, 1, LEAST_ANSWER)]
)
def test_a_few_tokens_keep_to_the_budget_and_the_ceiling(
    tiny, form, budget: int | None, ceiling: int | None, told: int, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = Assistant(build_policy(*tiny, slots=1, form=form), ServeSettings(context=512))
    script_answers(monkeypatch, assistant.policy, "a) sells 1\n" * 40)
    most = assistant.limiter.least_room - 1
    reply = begin(assistant, "fixed" if budget else "auto", budget, ceiling=ceiling, max_tokens=most)
    assert (reply.given, reply.allowed) == (told, allowed)
    assert reply.body.request.prefill.startswith(render_budget(told, form))
    assert reply.is_answering == form.answered
    answer = reply.wait()
    assert answer.used == answer.tokens == (most if form.answered else allowed)  # after thoughts it has the reserve
    assert answer.stop_reason == ("length" if form.answered else "ceiling")


def test_a_few_tokens_of_a_plain_model_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = load_tiny()()
    script_answers(monkeypatch, assistant.policy, "a) sells 1\n" * 40)
    answer = begin(assistant, "fixed", 10.0, max_tokens=assistant.limiter.least_room - 1).wait()
    assert (answer.given, answer.allowed, answer.tokens, answer.stop_reason) == (10, 11, 11, "ceiling")


def test_a_reserve_that_the_wrap_up_takes_is_refused_when_it_is_set(tiny) -> None:
    policy, settings = build_policy(*tiny, slots=1), ServeSettings(wrap_up="so " * 20)
    needed = len(policy.encode(settings.wrap_up))
    with pytest.raises(InputError, match=f"serve.reserve of {needed} tokens .* serve.wrap_up, which has {needed}"):
        Assistant(policy, replace(settings, reserve=needed))
    assert Assistant(policy, replace(settings, reserve=needed + 1)).limiter.reserve == needed + 1
