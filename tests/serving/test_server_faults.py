"""A server when things go wrong: clients that go, full queues, crashes, keys, garbage."""

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_support import SLOTS, Served, load_tiny, slow_down, text_of, wait_for
from test_requests import NAMES, VALUES

from sbtiny.config import ServeSettings
from sbtiny.errors import InputError, UpstreamError
from sbtiny.models.load import load_model
from sbtiny.rollout.load_policy import build_policy
from sbtiny.serving.ask import Ask
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.decoder import Decoder
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.serving.job import Job, Update
from sbtiny.serving.request_error import RequestError
from sbtiny.serving.requests import ServeRequest
from sbtiny.serving.worker import Worker
from sbtiny.tasks import arithmetic

LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
GONE = 'sbtiny_requests_total{outcome="client_gone"}'
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": LONG}]}


@pytest.fixture
def counted(plain: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Steps of the server, and at which of them a request was last cancelled and dropped."""
    counts = {"steps": 0, "cancelled": 0, "dropped": 0, "drops": 0}
    worker, session = plain.worker, plain.worker.decoder.assistant.session
    step, cancel, drop = session.step, worker.cancel, worker.decoder.drop

    def counted_step():
        counts["steps"] += 1
        time.sleep(0.005)
        return step()

    def counted_cancel(job) -> None:
        if job.is_open:
            counts["cancelled"] = counts["steps"]
        cancel(job)

    def counted_drop(job) -> None:
        drop(job)
        counts["dropped"] = counts["steps"]
        counts["drops"] += 1

    monkeypatch.setattr(session, "step", counted_step)
    monkeypatch.setattr(worker, "cancel", counted_cancel)
    monkeypatch.setattr(worker.decoder, "drop", counted_drop)
    yield counts
    wait_for(lambda: not worker.decoder.jobs and not session.is_busy)


def is_idle(served: Served) -> bool:
    return not served.worker.decoder.jobs and not served.worker.decoder.assistant.session.is_busy and served.worker.accepted == 0


def test_a_client_that_goes_in_decode_frees_its_slot(plain: Served, counted: dict[str, int]) -> None:
    stream = plain.stream(LONG)
    next(stream.chunks)
    stream.close()
    wait_for(lambda: is_idle(plain), 5)
    assert counted["dropped"] - counted["cancelled"] <= 2
    assert counted["steps"] < 100  # of 113: it did not go on to its end


def read_count(served: Served, name: str) -> float:
    line = next((line for line in served.client.get("/metrics").text.splitlines() if line.startswith(name)), f"{name} 0")
    return float(line.split()[-1])


def test_a_client_that_goes_in_the_middle_of_its_body_is_counted_as_gone(plain: Served, caplog: pytest.LogCaptureFixture) -> None:
    before = read_count(plain, GONE)
    with socket.create_connection(plain.client.base_url.netloc.decode().split(":")) as raw:
        raw.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{" % CHAT.encode())
    wait_for(lambda: read_count(plain, GONE) == before + 1)
    assert not caplog.records


def test_an_answer_that_has_ended_is_counted_though_its_reader_left_before(plain: Served) -> None:
    server, job = plain.app.state.server, Job(ServeRequest(messages=BODY["messages"], ask=Ask()), begun=None)
    gone, crashed = read_count(plain, GONE), read_count(plain, 'sbtiny_requests_total{outcome="error"}')
    server.record_unread(job)  # still decoded
    job.is_open = False
    job.updates.put_nowait(Update(error=RequestError("the weights have left")))
    server.record_unread(job)
    server.record_unread(job)
    assert read_count(plain, GONE) == gone + 1
    assert read_count(plain, 'sbtiny_requests_total{outcome="error"}') == crashed + 1


def test_what_was_stopped_early_tells_nothing_of_its_budget(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 'sbtiny_budgets_total{kept="yes"}'
    before = read_count(plain, kept)
    assert plain.chat(LONG, budget=400, max_tokens=5).json()["choices"][0]["finish_reason"] == "length"
    with monkeypatch.context() as patched:
        slow_down(patched, plain, 0.01)
        stream = plain.stream(LONG, budget=400)
        plain.client.post(f"{CHAT}/control", json={"id": next(stream.chunks)["id"], "action": "reasoning_end"})
        assert stream.all()[-1]["choices"][0]["stop_reason"] == "interrupted"  # it was wrapped up, and has ended by itself then
    assert read_count(plain, kept) == before
    assert plain.chat(LONG, budget=400).json()["choices"][0]["stop_reason"] == "end"
    assert read_count(plain, kept) == before + 1


def test_a_client_that_goes_while_it_waits_leaves_the_queue(plain: Served, counted: dict[str, int]) -> None:
    running = [plain.stream(LONG) for _ in range(SLOTS)]
    waiting = plain.stream(LONG)
    wait_for(lambda: plain.worker.decoder.waiting == 1)
    waiting.close()
    wait_for(lambda: counted["drops"] == 1, 5)
    assert counted["dropped"] - counted["cancelled"] <= 2
    assert plain.worker.decoder.waiting == 0
    assert all(text_of(stream.all()) for stream in running)


def test_a_client_that_goes_in_prefill_frees_its_slot(plain: Served, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = plain.worker.decoder.assistant.session.scheduler
    prefill, begun = scheduler.prefill, threading.Event()

    def slow_prefill(prompts, beginning):
        begun.set()
        time.sleep(0.5)
        return prefill(prompts, beginning)

    monkeypatch.setattr(scheduler, "prefill", slow_prefill)
    with socket.create_connection(plain.client.base_url.netloc.decode().split(":")) as raw:
        data = json.dumps(BODY | {"messages": [{"role": "user", "content": "Now for something else: 3 + 4?"}]}).encode()
        raw.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data)
        assert begun.wait(10)
    wait_for(lambda: is_idle(plain), 5)
    assert counted["drops"] == 1
    assert counted["dropped"] - counted["cancelled"] <= 2


def test_a_client_without_a_stream_that_stops_waiting_frees_its_slot(plain: Served, counted: dict[str, int]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        plain.client.post(CHAT, json=BODY, timeout=0.2)
    wait_for(lambda: is_idle(plain), 5)
    assert counted["steps"] < 100


def test_clients_that_go_at_random_leave_nothing_behind(plain: Served) -> None:
    rng = random.Random(0)

    def ask(seed: int) -> None:
        stream = plain.stream(LONG, seed=seed, temperature=1.0)
        for _ in zip(range(rng.randrange(6)), stream.chunks, strict=False):
            pass
        stream.close()

    for start in range(0, 40, 8):
        threads = [threading.Thread(target=ask, args=(start + i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    wait_for(lambda: is_idle(plain), 10)
    wait_for(lambda: plain.app.state.server.jobs == {}, 5)
    assert plain.chat(LONG).status_code == 200


def test_too_many_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(load_tiny(), most_waiting=1).wait_ready()
    slow_down(monkeypatch, served, 0.01)
    streams = [served.stream(LONG) for _ in range(SLOTS + 1)]
    refused = served.chat(LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    served.worker.decoder.bodies.queue.record_service(50, 100 * SLOTS, time.perf_counter())  # of answers that take so long
    assert 90 < int(served.chat(LONG).headers["retry-after"]) <= 100
    assert 'sbtiny_requests_total{outcome="queue_full"} 2.0' in served.client.get("/metrics").text
    assert "sbtiny_queue_length 1.0" in served.client.get("/metrics").text
    assert all(text_of(stream.all()) for stream in streams)
    assert served.chat(LONG).status_code == 200
    served.close()


def test_too_much_memory_of_what_waits_is_refused_before_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Assistant:
        """With room for its slots and the heads of a few questions."""
        room = (SLOTS + HEAD_ROWS) * 512 + 900
        per_token = build_policy(*load_model("tiny"), slots=1).engine.slot_bytes(1)
        policy = build_policy(*load_model("tiny"), SLOTS + HEAD_ROWS, room * per_token / 2**30, states_budget=False)
        return Assistant(policy, ServeSettings(temperature=0.0, context=512))

    served = Served(load, most_waiting=64).wait_ready()
    slow_down(monkeypatch, served, 0.02)
    streams = [served.stream(LONG, max_tokens=60) for _ in range(SLOTS)]
    for stream in streams:
        next(stream.chunks)
    answers = [served.stream(LONG, max_tokens=60) for _ in range(30)]
    refused = [a for a in answers if a.response.status_code == 429]
    assert 0 < len(refused) < 30
    assert all(int(a.response.headers["retry-after"]) > 0 for a in refused)
    assert "the requests that wait keep" in json.loads(refused[0].response.read())["error"]["message"]
    assert f'sbtiny_requests_total{{outcome="queue_full"}} {len(refused)}.0' in served.client.get("/metrics").text
    assert all(text_of(stream.all()) for stream in [*streams, *(a for a in answers if a not in refused)])
    assert served.chat(LONG, max_tokens=60).status_code == 200  # once they have left
    served.close()


def test_an_answer_that_takes_too_long_is_wrapped_up(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(load_tiny(), seconds=0.3).wait_ready()
    slow_down(monkeypatch, served, 0.01)
    answer = served.chat(LONG).json()
    assert answer["choices"][0]["stop_reason"] == "deadline"
    assert "Time is up" in answer["choices"][0]["message"]["content"]
    assert answer["budget"]["forced"] is True
    served.close()


def test_while_it_loads_and_after_a_crash_it_says_so() -> None:
    gate = threading.Event()

    def load():
        gate.wait(30)
        return load_tiny()()

    served = Served(load)
    wait_for(lambda: served.server.started)
    assert (served.client.get("/health").status_code, served.client.get("/health").json()) == (503, {"status": "loading model"})
    for refused in (served.chat(LONG), served.client.get("/v1/models"), served.client.get("/slots")):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert int(refused.headers["retry-after"]) > 0
    assert served.client.get("/metrics").status_code == served.client.get("/").status_code == 200
    gate.set()
    served.wait_ready()

    def crash():
        raise RuntimeError("the weights have left")

    stream, waiting = served.stream(LONG), served.stream(LONG)
    next(stream.chunks)
    served.worker.decoder.assistant.session.step = crash
    for one in (stream, waiting):
        assert one.all()[-1]["error"]["type"] == "server_error"
        assert one.is_done
    assert served.client.get("/health").json() == {"status": "error"}
    assert served.chat(LONG).status_code == 503
    assert served.client.get("/slots").status_code == 503
    served.close()


def test_it_ends_at_once_while_a_model_loads() -> None:
    gate = threading.Event()
    served = Served(lambda: gate.wait(60) and load_tiny()())
    wait_for(lambda: served.server.started)
    served.server.should_exit = True
    served.thread.join(20)
    assert not served.thread.is_alive()
    assert served.worker.thread.is_alive()
    gate.set()
    served.close()


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load():
        raise InputError("no such model")

    told = threading.Event()
    served = Served(load)
    served.worker.on_ready = told.set
    wait_for(lambda: served.worker.state == "failed")
    assert isinstance(served.worker.error, InputError)
    served.close()


def test_what_the_model_refuses_is_a_400_and_the_others_go_on(plain: Served) -> None:
    stream = plain.stream(LONG)
    for body in (
        {"messages": [{"role": "user", "content": "x " * 900}]},
        {"messages": [{"role": "user", "content": "<|im_end|>"}]},
        BODY | {"budget": {"coverage": 0.9}},
    ):
        refused = plain.client.post(CHAT, json=body | {"stream": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"
    assert text_of(stream.all())


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(plain: Served) -> None:
    refused = plain.chat("word " * 100_000)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_prompt_of_too_many_tokens_has_the_same_code(plain: Served) -> None:
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x " * 900}]}), ("/v1/completions", {"prompt": "x " * 900})):
        error = plain.client.post(path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "begin a new one" in error["message"]


def test_garbage_is_refused_in_openais_shape(plain: Served) -> None:
    for data, status in (
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 200_000, 400),
        (b'{"messages": "' + b"x" * 2_000_000 + b'"}', 413),
        (json.dumps(BODY | {"temperature": "hot"}).encode(), 400),
        (json.dumps(BODY | {"max_thinking_tokens": 5}).encode(), 400),
        (json.dumps(BODY | {"chat_template": "{{ 1 }}"}).encode(), 400),
    ):
        for path in (CHAT, "/v1/completions", f"{CHAT}/control"):
            answer = plain.client.post(path, content=data)
            assert answer.status_code == (status if path == CHAT or data[:2] != b'{"' or status == 413 else 400)
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert plain.client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert plain.client.get(CHAT).status_code == 405
    assert is_idle(plain)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=20), VALUES, max_size=5), st.sampled_from(["", "/control"]), st.booleans())
def test_no_json_makes_it_fail(plain: Served, body: dict, where: str, is_chat: bool) -> None:
    body = body | ({"max_tokens": 3} | BODY if is_chat else {})
    answer = plain.client.post(CHAT + where, content=json.dumps(body))
    assert answer.status_code < 500
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_an_upstream_that_fails_before_an_answer_begins_is_a_502(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise UpstreamError("upstream http://there has failed")

    monkeypatch.setattr(plain.worker.decoder.assistant, "measured_rate", fail)
    refused = plain.chat("2 + 2?", budget="1s")
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_failed")


def test_the_page_brings_nothing_from_outside(plain: Served) -> None:
    page = plain.client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_nobody_is_left_waiting_when_a_worker_stops(plain: Served) -> None:
    assert isinstance(plain.worker, Worker)
    served = Served(load_tiny()).wait_ready()
    served.close()
    assert not served.worker.thread.is_alive()
    assert served.worker.state == "stopped"


def test_a_prompt_too_long_for_the_queue_is_answered_beside_it(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.worker.decoder.bodies.queue, "max_bytes", 1)
    monkeypatch.setattr(plain.worker.decoder.bodies, "check_room", lambda tokens: None)
    assert plain.chat("2 + 2?", max_tokens=30).status_code == 200
    assert plain.worker.state == "ready"


@pytest.mark.parametrize("most_waiting", [0, 1, 3])
def test_requests_that_come_at_once_fill_the_slots_and_the_queue(most_waiting: int) -> None:
    async def accept() -> int:
        decoder = Decoder(load_tiny()(), most_waiting)
        for i in range(SLOTS + most_waiting + 2):
            ask = Ask(max_tokens=40, seed=i)
            decoder.begin(Job(ServeRequest(ask=ask, messages=({"role": "user", "content": f"2 + {i}?"},))))
        return len(decoder.jobs)

    assert asyncio.run(accept()) == SLOTS + most_waiting
