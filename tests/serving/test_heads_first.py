"""Heads are decoded at once and bodies wait by their budget: given ones, on the bundled model, and those that a run states."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

import sbtiny
from sbtiny.budget.protocol import BudgetChoice
from sbtiny.budget.seconds import Rate
from sbtiny.config import ServeSettings, Settings
from sbtiny.rollout.engines.vllm_session import VllmSession
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.scheduler import count_bytes
from sbtiny.serving.ask import Ask
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HEAD_ROWS, HeadsFirst
from sbtiny.serving.queue import QueueFull
from sbtiny.serving.reply import Reply
from sbtiny.tasks import arithmetic

QUESTIONS = [q.question for q in arithmetic.generate_questions("val", 99)]
SHORT = [q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2]


@pytest.fixture(scope="module")
def stating(started) -> Assistant:
    """Of a run that states a budget, greedy, with one slot."""
    return sbtiny.load(str(started), settings=Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=1 + HEAD_ROWS)))


@pytest.fixture(scope="module")
def plain(tiny) -> Assistant:
    """Of the bundled model, whose budgets are given, greedy, with one slot."""
    return Assistant(build_policy(*tiny, slots=1 + HEAD_ROWS, states_budget=False), ServeSettings(temperature=0.0, context=512))


class Line:
    """A server's decoding without a server: its clock is the steps."""

    def __init__(self, assistant: Assistant, max_waiting: int | None = None) -> None:
        self.assistant, self.now, self.begun = assistant, 0, []
        engine = assistant.policy.engine
        self.per_token = engine.slot_bytes(1024) // 1024
        self.head_limit = assistant.limiter.head_tokens
        self.bodies = HeadsFirst(assistant.session, engine.rows, self.per_token, max_waiting, self.head_limit)
        self.queue, self.scheduler = self.bodies.queue, assistant.session.scheduler

    def ask(self, question: str, budget: int | None = None, factor: float | None = None, priority: int = 0) -> Reply:
        choice = BudgetChoice("fixed", float(budget)) if budget else BudgetChoice("scaled", factor) if factor else BudgetChoice("auto")
        reply = self.assistant.begin([{"role": "user", "content": question}], replace(self.assistant.defaults, choice=choice))
        self.bodies.add(reply, priority)
        return reply

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            before = set(self.bodies.bodies)
            self.assistant.step_each()
            self.now += 1
            self.bodies.after_step(float(self.now))
            self.begun += [reply for reply in self.bodies.bodies if reply not in before]

    def step_until_waiting(self, *replies: Reply) -> None:
        for _ in range(200):
            if all(reply in self.queue for reply in replies):
                return
            self.step()
        raise AssertionError("they did not come to wait")

    def drop(self, reply: Reply) -> None:
        self.assistant.drop(reply)
        self.bodies.drop(reply)

    def finish(self) -> None:
        for _ in range(5000):
            if not self.assistant.running:
                return
            self.step()
        raise AssertionError("they did not end")

    def is_empty(self) -> bool:
        """Whether nothing is left of any answer, in the session, in the queue and beside it."""
        s = self.scheduler
        left = [s.slots, s.queue, s.waiting, s.prefilled, s.held, self.queue, self.bodies.heads, self.bodies.bodies, self.assistant.running]
        return not any(map(len, left)) and self.queue.kept_bytes == 0

    def fill_slot(self) -> Reply:
        """Let an answer into the only slot that writes until it is dropped."""
        reply = self.ask(QUESTIONS[0], budget=300)
        token, append = self.assistant.policy.encode("7")[0], reply.body.append
        reply.body.append = lambda _, logprob, stops: append(token, logprob, stops)
        self.step(2)
        assert reply in self.bodies.bodies
        return reply


def test_heads_are_decoded_while_every_slot_is_taken(stating: Assistant) -> None:
    line = Line(stating)
    blocker = line.fill_slot()
    replies = [line.ask(question) for question in SHORT[:9]]
    line.step_until_waiting(*replies)
    assert all(reply.stated and reply.source == "stated" for reply in replies)
    assert list(line.bodies.bodies) == [blocker]
    assert not line.assistant.session.scheduler.queue
    assert line.queue.kept_bytes == sum((len(r.prompt) + len(r.body.written)) * line.per_token for r in replies)
    written = [len(reply.body.written) for reply in replies]
    line.step(5)
    assert [len(reply.body.written) for reply in replies] == written  # a body that waits takes no step
    line.drop(blocker)
    line.finish()
    assert line.is_empty()


def test_bodies_begin_in_the_order_of_their_stated_budgets(stating: Assistant) -> None:
    line = Line(stating)
    blocker = line.fill_slot()
    replies = [line.ask(question, factor=factor) for question, factor in zip(SHORT, (3.0, 1.0, 2.0, 1.5, 0.5, 4.0), strict=False)]
    line.step_until_waiting(*replies)
    assert len({reply.budget for reply in replies}) > 3
    assert all(reply.stated and reply.source == "scaled" for reply in replies)
    line.drop(blocker)
    line.finish()
    assert line.begun[1:] == sorted(replies, key=lambda reply: reply.budget)  # equals in the order they were filed


@pytest.mark.parametrize("seed", [0, 1])
def test_given_budgets_in_random_order_begin_from_the_least(plain: Assistant, seed: int) -> None:
    line = Line(plain)
    blocker = line.fill_slot()
    budgets = random.Random(seed).sample(range(8, 60), 12)
    replies = [line.ask(question, budget) for question, budget in zip(QUESTIONS, budgets, strict=False)]
    line.step_until_waiting(*replies)
    urgent = line.ask(QUESTIONS[20], budget=60, priority=-1)
    line.step_until_waiting(urgent)
    line.drop(blocker)
    line.finish()
    assert [reply.given for reply in line.begun[1:]] == [60, *sorted(budgets)]
    assert line.is_empty()


def test_tokens_are_those_of_each_answer_alone(plain: Assistant, stating: Assistant) -> None:
    for assistant, budgets in ((plain, (40, 8, 25, 60, 12, 33, 20)), (stating, (None,) * 7)):
        line = Line(assistant)
        replies = [line.ask(question, budget) for question, budget in zip(QUESTIONS, budgets, strict=False)]
        line.finish()
        assert line.is_empty()
        for question, reply in zip(QUESTIONS, replies, strict=False):
            alone = line.ask(question, reply.given)
            line.bodies.drop(alone)
            alone.wait()
            assert reply.body.written == alone.body.written
            assert reply.answer.text == alone.answer.text


@pytest.mark.parametrize("presses", [1, 2])
def test_a_press_on_a_waiting_answer_lets_it_in_at_once(plain: Assistant, presses: int) -> None:
    line = Line(plain)
    blocker = line.fill_slot()
    others, pressed = [line.ask(question, 20) for question in QUESTIONS[1:4]], line.ask(QUESTIONS[4], 60)
    line.step_until_waiting(*others, pressed)
    assert line.queue.position(pressed, float(line.now)) == 4
    for _ in range(presses):
        pressed.press()
    line.step()
    assert set(line.bodies.bodies) == {blocker, pressed}
    line.step(plain.limiter.least_room + line.head_limit)
    assert pressed.answer.stop_reason == "interrupted"
    assert ("Time is up. \\boxed{" in pressed.answer.text) is (presses == 1)
    assert not any(reply.is_done for reply in others)
    for reply in (blocker, *others):
        line.drop(reply)
    assert line.is_empty()


@pytest.mark.parametrize("where", ["unread head", "head", "head of a scaled budget", "waiting", "let in again", "body"])
def test_a_dropped_answer_leaves_nothing(stating: Assistant, where: str) -> None:
    line = Line(stating)
    blocker = line.fill_slot()
    dropped, other = line.ask(SHORT[1], factor=2.0 if "scaled" in where else None), line.ask(SHORT[2])
    if where == "head":
        line.step(3)
        assert dropped.body.written
        assert dropped in line.bodies.heads
    elif where == "head of a scaled budget":
        line.step(3)
        assert dropped.head.written
        assert dropped.body is None
    elif where != "unread head":
        line.step_until_waiting(dropped, other)
    if where in ("let in again", "body"):
        dropped.press()
        line.step(1 if where == "let in again" else 2)
        assert dropped in line.bodies.bodies
        assert (dropped.body in line.scheduler.held) is (where == "let in again")
    line.drop(dropped)
    line.drop(dropped)  # twice is no fault
    assert dropped not in line.queue
    assert dropped.body not in line.scheduler.held
    line.step_until_waiting(other)
    assert line.queue.kept_bytes == (len(other.prompt) + len(other.body.written)) * line.per_token
    line.drop(blocker)
    line.finish()
    assert other.answer is not None
    assert dropped.answer is None
    assert line.is_empty()


@pytest.mark.parametrize("together", [1, HEAD_ROWS])
def test_the_stated_budget_comes_within_ten_steps_whatever_waits(stating: Assistant, together: int) -> None:
    line = Line(stating)
    blocker = line.fill_slot()
    waiting = [line.ask(question) for question in SHORT[:12]]
    line.step_until_waiting(*waiting)
    for at in range(12, 12 + 3 * together, together):
        replies = [line.ask(question) for question in SHORT[at : at + together]]
        line.step(11)  # the first is the prefill's
        assert all(reply.stated for reply in replies)
        assert all(reply in line.queue for reply in replies)
    for reply in (blocker, *line.queue):
        line.drop(reply)
    assert line.is_empty()


def test_more_answers_than_may_wait_are_refused_before_they_are_read(plain: Assistant) -> None:
    line = Line(plain, max_waiting=2)
    line.bodies.check_room(1000)
    blocker, waiting = line.fill_slot(), []
    for question in QUESTIONS[1:3]:
        line.bodies.check_room(1000)
        waiting.append(line.ask(question, 20))
    with pytest.raises(QueueFull, match="the queue is full: 0 requests wait") as full:  # their heads count already
        line.bodies.check_room(1)
    assert full.value.retry_after >= 1
    line.step_until_waiting(*waiting)
    with pytest.raises(QueueFull, match="the queue is full: 2 requests wait"):
        line.bodies.check_room(1)
    line.drop(waiting[0])
    line.bodies.check_room(1)
    line.drop(blocker)
    line.finish()
    assert waiting[1].answer is not None
    assert line.is_empty()


def test_kept_keys_and_values_are_bounded(plain: Assistant) -> None:
    line = Line(plain)
    line.queue.max_bytes = 200 * line.per_token
    blocker, waiting = line.fill_slot(), line.ask(QUESTIONS[1], 20)
    line.step_until_waiting(waiting)
    used = line.queue.kept_bytes // line.per_token
    assert 0 < used < 100
    room = 200 - used - line.head_limit
    line.bodies.check_room(room)
    with pytest.raises(QueueFull, match="the requests that wait keep"):
        line.bodies.check_room(room + 1)
    for reply in (blocker, waiting):
        line.drop(reply)
    assert line.is_empty()


def test_a_head_that_finds_the_queue_full_goes_on_at_once(plain: Assistant) -> None:
    line = Line(plain, max_waiting=1)
    blocker = line.fill_slot()
    replies = [line.ask(question, 20) for question in QUESTIONS[1:3]]
    line.step(4)
    assert [reply in line.queue for reply in replies] == [True, False]
    assert set(line.bodies.bodies) == {blocker, replies[1]}
    line.drop(blocker)
    line.finish()
    assert all(reply.answer is not None for reply in replies)
    assert line.is_empty()


@pytest.mark.parametrize(("tokens", "rows"), [(512, 1), (700, 1), (2600, 4)])
def test_all_states_stay_within_the_memory_that_was_planned(tiny, tokens: int, rows: int) -> None:
    """Slots, held bodies and kept answers, at every step of a random load."""
    planned = tokens * build_policy(*tiny, slots=1).engine.slot_bytes(1)
    policy = build_policy(*tiny, slots=1 + HEAD_ROWS, kv_cache_gib=planned / 2**30, states_budget=False)
    line, rng = Line(Assistant(policy, ServeSettings(temperature=0.0, context=512))), random.Random(tokens)
    assert policy.engine.rows == rows
    answered, refusals, waited, kept = [], [], 0, 0
    for i in range(60):
        question = QUESTIONS[i % 40] + " Show your work." * rng.randrange(4)
        reply = line.ask(question, rng.randrange(8, 40))
        line.bodies.drop(reply)  # the server asks first
        try:
            line.bodies.check_room(len(reply.prompt))
            line.bodies.add(reply)
            answered.append(reply)
        except QueueFull as full:
            refusals.append(full.retry_after)
            line.drop(reply)
        for _ in range(rng.randrange(12)):
            line.step()
            waited, kept = max(waited, len(line.queue)), max(kept, len(line.scheduler.kept))
            beside = count_bytes(line.scheduler.held) + count_bytes(line.scheduler.kept)
            assert policy.engine.cache.nbytes + beside <= planned
    line.finish()
    assert line.is_empty()
    assert all(reply.answer is not None for reply in answered)
    assert refusals
    assert min(refusals) >= 1
    assert (waited > 0, kept > 0) == (rows > 1, tokens > 512)  # heads have rows of their own, where there are rows


def test_a_long_head_among_short_ones_counts_by_its_own_length(plain: Assistant) -> None:
    line = Line(plain)
    blocker, waiting = line.fill_slot(), line.ask("2 + 2? " * 30, 20)
    line.queue.max_bytes = (len(waiting.prompt) + 60 + 2 * line.head_limit) * line.per_token
    line.bodies.check_room(60)
    with pytest.raises(QueueFull):
        line.bodies.check_room(61)
    for reply in (blocker, waiting):
        line.drop(reply)
    assert line.is_empty()


def test_what_waits_in_an_engine_of_its_own_memory_is_bounded_by_its_number_alone() -> None:
    bodies = HeadsFirst(
        VllmSession(SimpleNamespace(make_ticket=None, capacity=None)), 1 + HEAD_ROWS, bytes_per_token=4096, max_waiting=1, head_limit=30
    )
    bodies.bodies[Reply([], [1], Ask(), lambda: None, Rate(), None, 0.9)] = 0.0
    bodies.check_room(10_000)
    bodies.queue.push("first", 20, 0.0, kept_bytes=10_000 * 4096)
    with pytest.raises(QueueFull, match="1 requests wait"):
        bodies.check_room(1)
