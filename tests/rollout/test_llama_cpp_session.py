"""The open loop over llama.cpp: requests that come and go give the tokens that they give alone; its threads."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import play_session

from sbtiny.errors import InputError
from sbtiny.rollout.engines.llama_cpp import count_threads
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.load_policy import build_gguf_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.session import Session
from sbtiny.tasks import arithmetic

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def policy(plain_gguf: Path) -> Iterator[Policy]:
    policy = build_gguf_policy(plain_gguf, slots=5)
    yield policy
    policy.engine.close()


@pytest.fixture
def fed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each batch that llama.cpp decodes."""
    sizes, feed = [], policy.engine.feed

    def counted(entries: list) -> list[np.ndarray]:
        sizes.append(len(entries))
        return feed(entries)

    monkeypatch.setattr(policy.engine, "feed", counted)
    return sizes


def asked(policy: Policy, count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    questions = arithmetic.generate_questions("val", count)
    return [policy.request(q.question, int(rng.integers(1, 100)), seed=i) for i, q in enumerate(questions)]


def finish(session: Session) -> None:
    while session.is_busy:
        session.step()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, logprobs=True)])
@pytest.mark.parametrize("kept_prefixes", [0, 3])
def test_requests_that_come_and_go_give_what_they_give_alone(policy: Policy, kept_prefixes: int, sampling: Sampling) -> None:
    requests = asked(policy, 40)
    alone = [policy.sample([request], sampling)[0] for request in requests]
    session = policy.engine.open_session(256, kept_prefixes)
    tickets, dropped = play_session(session, requests, sampling, np.random.default_rng(1), arrival=0.3)
    assert len(dropped) == 4
    for ticket, expected in zip(tickets, alone, strict=True):
        assert ticket.written == expected.completion_ids[: len(ticket.written)]
        assert (ticket.episode is None) == (ticket in dropped)
        if ticket.episode:
            assert (len(ticket.written), ticket.episode.stop_reason) == (len(expected.completion_ids), expected.stop_reason)
            assert np.allclose(ticket.episode.logprobs, expected.logprobs, atol=0.01)  # keys and values have 16 bits


def test_each_request_has_its_own_sampling(policy: Policy) -> None:
    requests = asked(policy, 9)
    samplings = [GREEDY, Sampling(0.7, top_p=0.9, logprobs=True), Sampling(1.3, top_k=9, min_p=0.05)] * 3
    session = policy.engine.open_session(256)
    tickets = [session.add(r, s) for r, s in zip(requests, samplings, strict=True)]
    finish(session)
    for ticket, request, sampling in zip(tickets, requests, samplings, strict=True):
        assert ticket.episode.completion_ids == policy.sample([request], sampling)[0].completion_ids
        assert bool(ticket.episode.logprobs) == sampling.logprobs


def test_a_prompt_that_goes_on_from_an_answer_is_not_fed_again(policy: Policy, fed: list[int]) -> None:
    first = replace(asked(policy, 1)[0], max_tokens=40)
    answer = policy.sample([first], GREEDY)[0].completion_ids
    later = Request((*first.prompt_ids, *answer[:25], *asked(policy, 2)[1].prompt_ids), 30)
    expected = policy.sample([later], GREEDY)[0].completion_ids
    for kept_prefixes, again in ((0, len(later.prompt_ids)), (1, len(later.prompt_ids) - len(first.prompt_ids) - 25)):
        session = policy.engine.open_session(256, kept_prefixes)
        session.add(first, GREEDY)
        finish(session)
        fed.clear()
        ticket = session.add(later, GREEDY)
        finish(session)
        assert ticket.episode.completion_ids == expected
        assert fed == [again] + [1] * (len(expected) - 1)


def test_the_same_prompt_again_computes_its_last_token_alone(policy: Policy, fed: list[int]) -> None:
    request = asked(policy, 1)[0]
    session = policy.engine.open_session(256, kept_prefixes=1)
    first, second = session.add(request, GREEDY), None
    finish(session)
    fed.clear()
    second = session.add(request, GREEDY)
    finish(session)
    assert second.written == first.written
    assert set(fed) == {1}


def test_a_dropped_request_leaves_its_slot_at_once(policy: Policy, fed: list[int]) -> None:
    session = policy.engine.open_session(256)
    tickets = [session.add(replace(r, max_tokens=50), GREEDY) for r in asked(policy, 7)]  # two more than there are slots
    session.step()
    for ticket in (tickets[0], tickets[3], tickets[5]):  # two that run, one in the queue
        session.drop(ticket)
    session.step()
    assert [len(t.written) for t in tickets] == [1, 2, 2, 1, 2, 0, 1]
    session.drop(tickets[6])
    fed.clear()
    session.step()
    assert fed == [3]
    finish(session)
    session.drop(tickets[1])  # it has ended
    assert [t.episode is None for t in tickets] == [True, False, False, True, False, True, True]


def test_a_prompt_longer_than_a_batch_is_fed_beside_running_answers(policy: Policy, fed: list[int]) -> None:
    short, words = replace(asked(policy, 1)[0], max_tokens=30), asked(policy, 12)
    long = Request(tuple(token for r in words for token in r.prompt_ids)[:460], 10)
    expected = [policy.sample([r], GREEDY)[0].completion_ids for r in (short, long)]
    session = policy.engine.open_session(512)
    fed.clear()
    tickets = [session.add(short, GREEDY)]
    session.step()
    tickets.append(session.add(long, GREEDY))
    finish(session)
    assert [t.written for t in tickets] == expected
    assert max(fed) <= policy.engine.width < 460
    assert fed[1] == policy.engine.width  # the running answer's token, and as much of the prompt as fits


@pytest.mark.parametrize("at", [1, 5, 20])
def test_answer_now_wraps_up_at_the_next_safe_point_and_a_second_press_ends_it(policy: Policy, at: int) -> None:
    wrap_up = tuple(policy.encode("\nTime is up. \\boxed{"))
    question = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
    request = policy.request(question, 200, seed=0, limits=Limits(None, None, wrap_up, 64), interrupt=Interrupt())
    plain = policy.sample([replace(request, limits=None, interrupt=None)], GREEDY)[0].completion_ids
    beside = [replace(r, max_tokens=60) for r in asked(policy, 3)]
    alone = [policy.sample([r], GREEDY)[0].completion_ids for r in beside]
    session = policy.engine.open_session(512)
    pressed, *others = [session.add(r, GREEDY) for r in (request, *beside)]
    while len(pressed.written) < at:
        session.step()
    request.interrupt.press()
    finish(session)
    start = pressed.episode.injected.index(True)
    assert tuple(pressed.written[start : start + len(wrap_up)]) == wrap_up
    assert pressed.written[:start] == plain[:start]
    assert at <= start <= at + 17
    assert (pressed.episode.stop_reason, pressed.episode.ended) == ("interrupted", True)
    assert [t.written for t in others] == alone
    again = session.add(replace(request, interrupt=Interrupt()), GREEDY)
    for _ in range(at):
        session.step()
    again.request.interrupt.press()
    again.request.interrupt.press()
    assert session.step() == [again]
    assert (len(again.written), again.episode.stop_reason, again.episode.ended) == (at, "interrupted", False)


def test_what_a_session_cannot_decode_is_refused_and_the_rest_goes_on(policy: Policy) -> None:
    session = policy.engine.open_session(64)
    ticket = session.add(policy.request("1+1", 8, seed=0), GREEDY)
    stopped = session.add(policy.request("1+1", 8, seed=0, interrupt=Interrupt()), GREEDY)
    stopped.request.interrupt.stop()
    with pytest.raises(InputError, match="exceed"):
        session.add(policy.request("1+1", 4096, seed=0), GREEDY)
    with pytest.raises(InputError, match="empty prompt"):
        session.add(Request((), 4), GREEDY)
    assert session.step() == [stopped]
    policy.engine.open_session(64)
    with pytest.raises(RuntimeError, match="another session"):
        session.step()
    assert (len(ticket.written), stopped.written) == (1, [])


@pytest.mark.parametrize("kept_prefixes", [0, 3])
def test_answers_that_are_held_and_go_on_are_as_if_they_had_not_been(policy: Policy, kept_prefixes: int) -> None:
    rng, requests = np.random.default_rng(3), asked(policy, 16)
    expected = [policy.sample([request], GREEDY)[0].completion_ids for request in requests]
    session = policy.engine.open_session(256, kept_prefixes)
    tickets, held = [session.add(r, GREEDY) for r in requests], []
    while session.is_busy or held:
        running = list(session.running.values())
        if running and rng.random() < 0.3:
            held.append(running[rng.integers(len(running))])
            assert session.hold(held[-1]) > 1000
        if held and rng.random() < 0.3:
            session.resume(held.pop(rng.integers(len(held))))
        session.step()
    assert [t.written for t in tickets] == expected
    dropped = session.add(requests[0], GREEDY)
    session.step()
    session.hold(dropped)
    session.drop(dropped)
    assert not session.is_busy
    with pytest.raises(ValueError, match="not held"):
        session.resume(dropped)


def test_a_held_state_takes_the_bytes_that_its_tokens_are_counted_at(policy: Policy) -> None:
    """A queue counts so many bytes for each token before it is held; llama.cpp adds a little of its own."""
    session = policy.engine.open_session(256, kept_prefixes=1)
    ticket = session.add(replace(asked(policy, 1)[0], max_tokens=100), GREEDY)
    for _ in range(20):
        session.step()
    tokens = len(ticket.request.prompt_ids) + len(ticket.written)
    assert session.spare_bytes > 0
    assert session.hold(ticket) <= 1.05 * policy.engine.slot_bytes(tokens)


def test_after_a_session_that_was_too_long_a_shorter_one_is_opened(plain_gguf: Path) -> None:
    policy = build_gguf_policy(plain_gguf, slots=2)
    policy.engine.kv_cache_gib = policy.engine.slot_bytes(1000) / 2**30
    request = asked(policy, 1)[0]
    expected = policy.sample([request], GREEDY)[0].completion_ids
    with pytest.raises(InputError, match="no room for an answer"):
        policy.engine.open_session(100_000)
    assert policy.sample([request], GREEDY)[0].completion_ids == expected
    policy.engine.close()


@pytest.mark.parametrize(("wish", "threads"), [("3", 3), ("4,2", 4), (" 2 , 1", 2), ("0", 7), ("", 7), ("many", 7), ("-1", 7)])
def test_its_threads_are_what_omp_says_or_the_cores_that_it_may_use(wish: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", wish)
    assert count_threads() == threads
