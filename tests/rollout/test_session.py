"""The open loop: requests that come and go give the tokens that they give alone."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from support import play_session

from sbtiny.errors import InputError
from sbtiny.rollout import engine as engine_module
from sbtiny.rollout import scheduler
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.scheduler import common_length, count_bytes
from sbtiny.tasks import arithmetic

GREEDY = Sampling(temperature=0)


def asked(policy, count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    questions = arithmetic.generate_questions("val", count)
    return [policy.request(q.question, int(rng.integers(1, 120)), seed=i) for i, q in enumerate(questions)]


@pytest.mark.parametrize("kept_prefixes", [0, 3])
def test_requests_that_come_and_go_give_what_they_give_alone(policy, poisoned, kept_prefixes: int) -> None:
    requests = asked(policy, 64)
    for sampling in (GREEDY, Sampling(1.0, logprobs=True)):
        alone = policy.sample(requests, sampling)
        session = policy.engine.open_session(256, kept_prefixes)
        tickets, dropped = play_session(session, requests, sampling, np.random.default_rng(1))
        assert len(dropped) == 6
        for ticket, expected in zip(tickets, alone, strict=True):
            if ticket in dropped:
                assert ticket.episode is None
                assert ticket.written == expected.completion_ids[: len(ticket.written)]
            else:
                assert (ticket.episode.completion_ids, ticket.episode.stop_reason) == (expected.completion_ids, expected.stop_reason)
                assert np.allclose(ticket.episode.logprobs, expected.logprobs, atol=1e-4)


def test_longer_sequences_move_before_shorter_ones(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a block of slots has a span of its own: all of them would attend over that of the longest."""
    monkeypatch.setattr(scheduler, "CPU_BLOCK", 4)
    session, spans = policy.engine.open_session(256), []
    for request in asked(policy, 300):
        session.add(request, GREEDY)
    while session.is_busy:
        session.step()
        positions = session.scheduler.positions[: len(session.scheduler.slots)]
        blocks = np.split(positions, range(4, len(positions), 4)) if len(positions) else []
        spans += [(sum(len(block) * block.max() for block in blocks), len(positions) * positions.max(), positions.sum())] if blocks else []
    in_blocks, together, needed = np.sum(spans, axis=0)
    assert needed < in_blocks < needed + 0.4 * (together - needed)


def test_tokens_can_be_read_between_steps(policy) -> None:
    request = asked(policy, 1)[0]
    session = policy.engine.open_session(256)
    ticket, lengths = session.add(request, GREEDY), []
    while session.is_busy:
        session.step()
        lengths.append(len(ticket.written))
    assert lengths == list(range(1, len(lengths) + 1))


def test_each_request_has_its_own_sampling(policy) -> None:
    requests = asked(policy, 12)
    samplings = [GREEDY, Sampling(0.7, top_p=0.9, logprobs=True), Sampling(1.3)] * 4
    session = policy.engine.open_session(256)
    tickets = [session.add(r, replace(s)) for r, s in zip(requests, samplings, strict=True)]
    while session.is_busy:
        session.step()
    for ticket, request, sampling in zip(tickets, requests, samplings, strict=True):
        alone = policy.sample([request], sampling)[0]
        assert ticket.episode.completion_ids == alone.completion_ids
        assert bool(ticket.episode.logprobs) == sampling.logprobs


def test_a_prompt_that_goes_on_from_an_answer_is_not_computed_again(policy, poisoned, monkeypatch) -> None:
    """Neither after the answer has ended nor while it runs, and the tokens are those of a whole computation."""
    first = replace(asked(policy, 1)[0], max_tokens=60)
    answer = policy.sample([first], GREEDY)[0].completion_ids
    rest = asked(policy, 2)[1].prompt_ids
    later = Request((*first.prompt_ids, *answer[:30], *rest), 40)
    expected = policy.sample([later], GREEDY)[0].completion_ids
    computed, prefill = [], Engine._prefill

    def counted(self, prompts, beginning=None):
        computed.append(len(prompts[0]) - 1 - (0 if beginning is None else beginning.shape[-2]))
        return prefill(self, prompts, beginning)

    monkeypatch.setattr(Engine, "_prefill", counted)
    for steps in (35, 200):  # while it runs, and after
        session = policy.engine.open_session(256, kept_prefixes=1)
        session.add(first, GREEDY)
        for _ in range(steps):
            session.step()
        ticket = session.add(later, GREEDY)
        while session.is_busy:
            session.step()
        assert ticket.episode.completion_ids == expected
    shared = len(first.prompt_ids) + common_length(answer, later.prompt_ids[len(first.prompt_ids) :])
    assert computed == [len(first.prompt_ids) - 1, len(later.prompt_ids) - 1 - shared] * 2


def test_a_dropped_request_leaves_its_slot_at_once(tiny) -> None:
    policy = build_policy(*tiny, slots=1)
    session = policy.engine.open_session(256)
    first, second, third = (session.add(r, GREEDY) for r in asked(policy, 3))
    session.step()
    session.drop(first)
    session.drop(second)
    session.step()
    assert (len(first.written), len(second.written), len(third.written)) == (1, 0, 1)
    while session.is_busy:
        session.step()
    session.drop(third)
    assert first.episode is second.episode is None
    assert third.episode is not None


def test_what_a_session_cannot_decode_is_refused_and_the_rest_goes_on(policy) -> None:
    session = policy.engine.open_session(64)
    ticket = session.add(policy.request("1+1", 8, seed=0), GREEDY)
    with pytest.raises(InputError, match="exceed the context of 64"):
        session.add(policy.request("1+1", 64, seed=0), GREEDY)
    with pytest.raises(InputError, match="empty prompt"):
        session.add(Request((), 4), GREEDY)
    session.step()
    policy.engine.open_session(64)
    with pytest.raises(RuntimeError, match="another session"):
        session.step()
    assert len(ticket.written) == 1


def test_no_part_of_an_answer_draws_as_another_or_as_that_of_its_neighbour(policy) -> None:
    tickets = [policy.engine.make_ticket(policy.request("1 + 1?", 90, seed), Sampling()) for seed in range(5)]
    seeds = [tickets[seed].part_seed(31) for seed in range(5)]
    assert seeds == list(range(5))  # an answer in one part has its own
    for written in range(40):
        for ticket in tickets:
            ticket.written = [0] * written
            seeds += [ticket.part_seed(31, masks=True), *([ticket.part_seed(31)] if written else [])]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**31


def test_a_request_stopped_in_the_queue_never_begins(policy) -> None:
    interrupt = Interrupt()
    session = policy.engine.open_session(256)
    tickets = [session.add(replace(r, interrupt=interrupt), GREEDY) for r in asked(policy, 14)]
    session.step()
    interrupt.press()
    while session.is_busy:
        session.step()
    assert {t.episode.stop_reason for t in tickets} == {"interrupted"}
    assert [len(t.written) for t in tickets] == [1] * 12 + [0] * 2


def test_generate_decodes_batches_and_says_that_it_does_not_stream(tiny, policy) -> None:
    generate = build_policy(*tiny, slots=5, engine="generate")
    requests = asked(policy, 7)
    session = generate.engine.open_session(256)
    assert not session.streams
    assert policy.engine.open_session(256).streams
    tickets = [session.add(r, s) for r, s in zip(requests, [GREEDY, Sampling(1.0)] * 4, strict=False)]
    session.drop(tickets[6])
    assert [len(session.step()) for _ in range(3)] == [5, 1, 0]
    for ticket, sampling in zip(tickets[:6], [GREEDY, Sampling(1.0)] * 3, strict=True):
        assert ticket.episode.completion_ids == policy.sample([ticket.request], sampling)[0].completion_ids


@pytest.mark.parametrize("kept_prefixes", [0, 2])
def test_answers_that_are_held_and_go_on_are_as_if_they_had_not_been(tiny, poisoned, kept_prefixes: int) -> None:
    policy, rng = build_policy(*tiny, slots=4), np.random.default_rng(2)
    requests = asked(policy, 24)
    expected = [e.completion_ids for e in policy.sample(requests, Sampling(1.0))]
    session = policy.engine.open_session(256, kept_prefixes)
    tickets, held = [session.add(r, Sampling(1.0)) for r in requests], []
    while session.is_busy or held:
        running = list(session.scheduler.slots)
        if running and rng.random() < 0.3:
            ticket = running[rng.integers(len(running))]
            before = session.hold(ticket)
            assert before == session.scheduler.held[ticket].numel() * 4
            held.append(ticket)
        if held and rng.random() < 0.3:
            session.resume(held.pop(rng.integers(len(held))))
        session.step()
    assert [t.episode.completion_ids for t in tickets] == expected
    dropped = session.add(requests[0], GREEDY)
    session.step()
    session.hold(dropped)
    session.drop(dropped)
    assert not session.scheduler.held
    assert not session.is_busy
    with pytest.raises(ValueError, match="not held"):
        session.resume(dropped)


def test_a_prompt_that_stands_whole_in_a_slot_is_not_lost_with_it(policy) -> None:
    """Others wait with the same prompt while that slot goes to another question."""
    same, other = asked(policy, 2)
    same = replace(same, max_tokens=40)
    alone = policy.sample([same], GREEDY)[0].completion_ids
    session = policy.engine.open_session(256, kept_prefixes=4)
    session.scheduler.cache = policy.engine.cache[:, :, :2]
    first = session.add(replace(same, max_tokens=30), GREEDY)
    for _ in range(3):
        session.step()
    tickets = [session.add(request, GREEDY) for request in (same, replace(other, max_tokens=60), same)]
    while session.is_busy:
        session.step()
    assert first.written == alone[:30]
    assert [tickets[0].written, tickets[2].written] == [alone, alone]


def test_a_longer_run_frees_the_cache_of_the_last_before_it_allocates(tiny, monkeypatch) -> None:
    policy = build_policy(*tiny, slots=2)
    policy.sample([policy.request("2 + 2?", 8, seed=0)], GREEDY)
    old, living = weakref.ref(policy.engine.cache), []
    fit = engine_module.fit_slots
    monkeypatch.setattr(engine_module, "fit_slots", lambda *given: living.append(old() is not None) or fit(*given))
    policy.sample([policy.request("2 + 2?", 300, seed=0)], GREEDY)
    assert living == [False]


def test_a_prompt_that_cannot_be_computed_now_waits_for_the_next_step(policy, monkeypatch) -> None:
    request = asked(policy, 1)[0]
    session = policy.engine.open_session(256)
    ticket, prefill = session.add(request, GREEDY), session.scheduler.prefill
    monkeypatch.setattr(session.scheduler, "prefill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step()
    monkeypatch.setattr(session.scheduler, "prefill", prefill)
    while session.is_busy:
        session.step()
    assert ticket.written == policy.sample([request], GREEDY)[0].completion_ids


# ---- memory ----------------------------------------------------------------------------------------------------------------------------


def test_slots_leave_a_share_of_the_memory_for_the_states_beside_them(tiny, capsys: pytest.CaptureFixture) -> None:
    slot = build_policy(*tiny, slots=1).engine.slot_bytes(256)
    for room, kept, rows in ((10, 0, 10), (10, 2, 8), (3, 2, 2), (1, 2, 1), (100, 2, 16)):
        engine = build_policy(*tiny, slots=16, kv_cache_gib=room * slot / 2**30).engine
        session = engine.open_session(256, kept)
        assert (engine.rows, session.spare_bytes) == (rows, (room - rows) * slot)
    assert "decoding 8 answers at once, not 16" in capsys.readouterr().err
    with pytest.raises(InputError, match="no room for an answer"):
        build_policy(*tiny, slots=16, kv_cache_gib=0.9 * slot / 2**30).engine.open_session(256, 2)


@pytest.mark.parametrize("tokens", [0, 60, 150, 400])
def test_kept_and_held_states_stay_within_what_the_slots_leave(tiny, tokens: int) -> None:
    """Whoever holds answers asks for their room first, as the server's queue does; kept ones make room by themselves."""
    policy = build_policy(*tiny, slots=4)
    session = policy.engine.open_session(256, kept_prefixes=3)
    scheduler, per_token = session.scheduler, policy.engine.slot_bytes(1)
    scheduler.spare_bytes = tokens * per_token
    most_kept, tickets = 0, []
    for request in asked(policy, 24):
        tickets.append(session.add(request, GREEDY))
        for _ in range(6):
            session.step()
            room = scheduler.spare_bytes - count_bytes(scheduler.held)
            if scheduler.slots and int(scheduler.positions[0]) * per_token <= room:
                session.hold(scheduler.slots[0])
            assert count_bytes(scheduler.held) + count_bytes(scheduler.kept) <= scheduler.spare_bytes
            most_kept = max(most_kept, len(scheduler.kept))
        for ticket in [t for t in scheduler.held if t not in scheduler.queue][:1]:
            session.resume(ticket)
    for ticket in [t for t in scheduler.held if t not in scheduler.queue]:
        session.resume(ticket)
    while session.is_busy:
        session.step()
        assert count_bytes(scheduler.held) + count_bytes(scheduler.kept) <= scheduler.spare_bytes
        most_kept = max(most_kept, len(scheduler.kept))
    assert all(ticket.episode is not None for ticket in tickets)
    assert (most_kept > 0) is (tokens > 0)
    assert most_kept <= 3


def test_a_held_answer_takes_the_room_of_kept_ones(tiny) -> None:
    policy = build_policy(*tiny, slots=2)
    session = policy.engine.open_session(256, kept_prefixes=3)
    scheduler = session.scheduler
    first, second = (session.add(request, GREEDY) for request in asked(policy, 2))
    while first.episode is None and second.episode is None:
        session.step()
    assert len(scheduler.kept) == 1
    third = session.add(asked(policy, 3)[2], GREEDY)
    session.step()
    scheduler.spare_bytes = count_bytes(scheduler.kept)
    session.hold(third)
    assert not scheduler.kept
