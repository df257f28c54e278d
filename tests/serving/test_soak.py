"""The server for a long time: clients that go in every place, streams for minutes, and thousands of requests of its own OpenAPI.

SBTINY_SOAK_SECONDS=120 SBTINY_SCHEMA_CASES=2000 make test-slow
"""

import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serve_support import SLOTS, Command, Served, Stream, load_tiny, text_of, wait_for

from sbtiny.serving.job import Job
from sbtiny.tasks import arithmetic

SECONDS = float(os.environ.get("SBTINY_SOAK_SECONDS", "600"))
CASES = int(os.environ.get("SBTINY_SCHEMA_CASES", "20000"))
STREAMS = 64
CHAT = "/v1/chat/completions"
QUESTIONS = [q.question for q in arithmetic.generate_questions("val", 99)]
LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)

pytestmark = pytest.mark.slow


# ---- clients that go -------------------------------------------------------------------------------------------------------------------


class Steps:
    """Counts the server's steps. `of` has, of each request that was cancelled, the steps at its cancel and at its drop.

    `gone` are the steps when the client left, which the machine's load decides the server's notice of.
    """

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.gone, self.of = 0, 0, {}
        worker, session = served.worker, served.worker.decoder.assistant.session
        self.prefilling, self.prefill_seconds = threading.Event(), 0.0
        step, cancel, drop, prefill = session.step, worker.cancel, worker.decoder.drop, session.scheduler.prefill

        def counted_step() -> Any:
            self.count += 1
            time.sleep(0.005)
            return step()

        def counted_cancel(job: Job) -> None:
            if job.is_open:
                self.of[job.id] = [self.count]
            cancel(job)

        def counted_drop(job: Job) -> None:
            drop(job)
            self.of[job.id].append(self.count)

        def slow_prefill(*arguments: Any) -> Any:
            self.prefilling.set()
            time.sleep(self.prefill_seconds)
            return prefill(*arguments)

        monkeypatch.setattr(session, "step", counted_step)
        monkeypatch.setattr(worker, "cancel", counted_cancel)
        monkeypatch.setattr(worker.decoder, "drop", counted_drop)
        monkeypatch.setattr(session.scheduler, "prefill", slow_prefill)

    @property
    def late(self) -> list[int]:
        """Steps between cancel and drop of each."""
        return [dropped - cancelled for cancelled, dropped in self.of.values()]

    def wait_dropped(self, count: int) -> None:
        wait_for(lambda: sum(len(steps) == 2 for steps in list(self.of.values())) == count)


def go_while_queued(served: Served, steps: Steps, rng: random.Random) -> None:
    holders = [served.stream(LONG) for _ in range(SLOTS)]
    waiting = served.stream(rng.choice(QUESTIONS))
    queue = served.worker.decoder.bodies.queue
    wait_for(lambda: len(queue) == 1)
    time.sleep(rng.random() / 50)
    steps.gone = steps.count
    waiting.close()
    for holder in holders:  # each of them goes too, in decode
        holder.close()
    steps.wait_dropped(SLOTS + 1)


def go_in_prefill(served: Served, steps: Steps, rng: random.Random) -> None:
    steps.prefill_seconds = 0.02 + rng.random() / 10
    steps.prefilling.clear()
    body = json.dumps({"messages": [{"role": "user", "content": f"{rng.random()} + 4?"}]}).encode()
    with socket.create_connection(served.client.base_url.netloc.decode().split(":")) as raw:
        raw.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body)
        assert steps.prefilling.wait(10)
        steps.gone = steps.count
    steps.wait_dropped(1)
    steps.prefill_seconds = 0.0


def go_in_decode(served: Served, steps: Steps, rng: random.Random) -> None:
    stream = served.stream(LONG, seed=rng.randrange(99), temperature=1.0, max_tokens=400)
    for _ in zip(range(rng.randrange(1, 4)), stream.chunks, strict=False):
        pass
    steps.gone = steps.count
    stream.close()
    steps.wait_dropped(1)


def sockets_of(process: psutil.Process, port: int) -> int:
    """Connections to the server that are not closed yet."""
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in process.net_connections("tcp"))


def test_300_clients_that_go_leave_their_slots_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(load_tiny()).wait_ready()
    served.chat(LONG)
    decoder, rng = served.worker.decoder, random.Random(0)
    session, port = decoder.assistant.session, served.client.base_url.port
    threads, late, since_gone = threading.active_count(), Counter(), Counter()
    places = [go_while_queued, go_in_prefill, go_in_decode] * 100
    rng.shuffle(places)
    with monkeypatch.context() as patched:
        steps = Steps(served, patched)
        for go in places:
            steps.of.clear()
            go(served, steps, rng)
            late.update(steps.late)
            since_gone[next(iter(steps.of.values()))[1] - steps.gone] += 1
            assert max(steps.late) <= 2
            wait_for(lambda: served.worker.accepted == 0 and not session.is_busy and not decoder.jobs, 10)
    print(f"steps to a free slot, from the server's notice: {sorted(late.items())}; from the client's end: {sorted(since_gone.items())}")
    scheduler, bodies = session.scheduler, decoder.bodies
    assert not any((scheduler.slots, scheduler.queue, scheduler.waiting, scheduler.prefilled, scheduler.held))
    assert not any((bodies.heads, bodies.bodies, len(bodies.queue), bodies.queue.kept_bytes, decoder.assistant.running))
    wait_for(lambda: served.app.state.server.jobs == {}, 5)
    served.client.close()
    wait_for(lambda: sockets_of(psutil.Process(), port) == 0, 10)
    assert threading.active_count() == threads
    served.client = httpx.Client(base_url=served.url, timeout=60)
    assert served.chat(LONG).status_code == 200
    served.close()


# ---- streams for minutes ---------------------------------------------------------------------------------------------------------------


class Readers:
    """Clients that ask without end, and how each request ended."""

    def __init__(self, url: str) -> None:
        self.url, self.ends, self.is_over = url, Counter(), threading.Event()
        self.lost: list[str] = []
        self.threads = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(STREAMS)]

    def _ask_on(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=300) as client:
            while not self.is_over.is_set():
                try:
                    end = self._ask(client, rng)
                except Exception as error:  # whatever it is, the request is lost
                    self.lost.append(repr(error))
                    end = "lost"
                self.ends[end] += 1
                if end == "refused":
                    time.sleep(rng.random())

    def _ask(self, client: httpx.Client, rng: random.Random) -> str:
        asked = {
            "temperature": rng.choice([0, 0.6, 1.0]),
            "max_tokens": rng.choice([3, 60, 400]),
            "budget": rng.choice([None, 0, 20, "12s"]),
        }
        body = asked | {"messages": [{"role": "user", "content": rng.choice(QUESTIONS)}]}
        if rng.random() < 0.2:
            return end_of(client.post(CHAT, json=body).json())
        stream = Stream(client, CHAT, body | {"stream": True})
        if stream.response.status_code != 200:
            stream.response.read()
            refusal = stream.response.json()
            stream.close()
            return end_of(refusal)
        chunks, most = [], rng.randrange(12) if rng.random() < 0.4 else 10**6
        for chunk in stream.chunks:
            chunks.append(chunk)
            if len(chunks) > most:
                stream.close()
                return "cancelled"
        stream.close()
        assert stream.is_done
        assert "error" in chunks[-1] or text_of(chunks)
        return end_of(chunks[-1])


def end_of(last: dict[str, Any]) -> str:
    """How a request ended, by the last that was said of it."""
    if "error" in last:
        assert last["error"].keys() == {"message", "type", "param", "code"}
        assert last["error"]["code"] == "queue_full", last
        return "refused"
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    return "answered"


@pytest.fixture
def soaked() -> Iterator[Command]:
    flags = ["--slots", "16", "--queue", "40", "--set", "serve.context=512"]
    command = Command("tiny", *flags)
    yield command
    command.process.kill()
    command.process.wait()


def test_streams_and_cancels_for_minutes_lose_nothing_and_keep_nothing(soaked: Command) -> None:
    process, port = psutil.Process(soaked.process.pid), int(soaked.url.rpartition(":")[2])
    with httpx.Client(base_url=soaked.url, timeout=60) as client:
        client.post(CHAT, json={"messages": [{"role": "user", "content": LONG}]})
    threads, readers, resident = process.num_threads(), Readers(soaked.url), []
    for thread in readers.threads:
        thread.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(0.5)
        resident.append(process.memory_info().rss / 2**20)
    readers.is_over.set()
    for thread in readers.threads:
        thread.join(300)
    tenth = len(resident) // 10
    second, last = statistics.median(resident[tenth : 2 * tenth]), statistics.median(resident[-tenth:])
    by_tenth = [round(statistics.median(resident[i * tenth : (i + 1) * tenth]), 1) for i in range(10)]
    print(f"{SECONDS:g} s: {dict(readers.ends)}; MiB by tenths: {by_tenth}; last / second {last / second:.4f}")
    assert readers.lost == []
    assert {"answered", "cancelled"} <= readers.ends.keys()
    assert last < 1.03 * second
    wait_for(lambda: sockets_of(process, port) == 0, 10)
    with httpx.Client(base_url=soaked.url, timeout=60) as client:
        wait_for(lambda: client.get("/slots").json() == [], 10)
        assert "sbtiny_requests_open 0.0" in client.get("/metrics").text
    assert process.num_threads() <= threads
    assert soaked.leave(signal.SIGTERM) == 0


# ---- its own OpenAPI -------------------------------------------------------------------------------------------------------------------


def test_no_request_of_its_own_openapi_makes_it_fail() -> None:
    """Half of the requests keep to it, half do not."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    import requests

    served = Served(load_tiny(max_tokens=8)).wait_ready()
    found = [one.ok() for one in schemathesis.openapi.from_url(f"{served.url}/openapi.json").get_all_operations()]
    posts, statuses = [operation for operation in found if operation.method == "post"], Counter()
    assert len(found) - len(posts) == 5
    with requests.Session() as session:
        for operation in found:
            for mode in schemathesis.GenerationMode if operation in posts else [schemathesis.GenerationMode.POSITIVE]:

                @settings(max_examples=CASES // (2 * len(posts)), database=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
                @given(case=operation.as_strategy(generation_mode=mode))
                def ask(case: Any) -> None:
                    answer = case.call(session=session)
                    statuses[answer.status_code] += 1
                    assert answer.status_code < 500
                    if answer.status_code >= 400:
                        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

                ask()
    print(f"{statuses.total()} cases: {dict(sorted(statuses.items()))}")
    assert statuses.total() >= 0.9 * CASES
    assert served.worker.state == "ready"
    assert served.worker.accepted == 0
    served.close()
