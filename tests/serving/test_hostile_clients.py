"""Clients that mean ill: bodies without end, nesting, wrong types in every field, streams that nobody reads."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from serve_support import Served, load_tiny, text_of, wait_for, write_script

from sbtiny.serving import decoder as decoder_file
from sbtiny.serving.app import COMMON
from sbtiny.serving.budget_dialects import NESTED, WRAPPERS
from sbtiny.serving.requests import REFUSED
from sbtiny.tasks import arithmetic

LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "2 + 2?"}]}
MIB = 2**20
WRONG = (True, 0, -2, 1.5, 1e308, 10**40, 10**400, "", "x", "\0\n", [], [None], [[]], {}, {"": {}}, {"type": 5}, [{"role": None}])


def test_a_body_of_100_mb_is_refused_and_not_kept(plain: Served) -> None:
    """Also one that does not say its length; others are answered meanwhile."""
    other = plain.stream(LONG)
    before, most = psutil.Process().memory_info().rss, 0

    def parts() -> Iterator[bytes]:
        nonlocal most
        yield b'{"messages": "'
        for _ in range(100):
            yield b"x" * 1_000_000
            most = max(most, psutil.Process().memory_info().rss)

    for headers in ({}, {"Content-Length": str(100_000_014)}):
        refused = plain.client.post(CHAT, content=parts(), headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")
    assert most - before < 50 * MIB
    assert text_of(other.all())


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("where", ["", "messages", "budget", "extra_body", "metadata"])
def test_nesting_of_100_000_is_refused(plain: Served, opening: str, closing: str, where: str) -> None:
    nested = opening * 100_000 + ("1" + closing * 100_000 if where else "")
    data = json.dumps(BODY | {where: "HERE"}).replace('"HERE"', nested) if where else nested
    for path in (CHAT, "/v1/completions", f"{CHAT}/control"):
        refused = plain.client.post(path, content=data.encode())
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] in ("too_deep", "not_json")


@pytest.mark.parametrize("name", sorted({*COMMON, *REFUSED, *WRAPPERS, *NESTED, "messages", "max_completion_tokens"}))
def test_a_wrong_type_in_any_field_is_refused_or_ignored(plain: Served, name: str) -> None:
    for value in WRONG:
        answer = plain.client.post(CHAT, json=BODY | {"max_tokens": 1} | {name: value})
        assert answer.status_code in (200, 400), (name, value)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"].partition(".")[0].partition("[")[0] == name
        else:
            assert name not in answer.text or "choices" in answer.text


@pytest.mark.parametrize(("path", "name"), [("/v1/completions", "prompt"), (f"{CHAT}/control", "id"), (f"{CHAT}/control", "action")])
def test_a_wrong_type_in_the_fields_of_the_other_routes_is_refused(plain: Served, path: str, name: str) -> None:
    for value in WRONG:
        body: dict[str, Any] = {"id": "x", "action": "stop", "max_tokens": 1} | {name: value}
        answer = plain.client.post(path, json=body)
        assert answer.status_code in (200, 400, 404)
        assert (answer.status_code == 200) == (name == "prompt" and isinstance(value, str) and bool(value.strip()))
        assert answer.status_code == 200 or answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_one_that_does_not_read_holds_no_slot_and_slows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream stands still in full sockets, and is whole when it reads again."""
    monkeypatch.setattr(decoder_file, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(decoder_file, "EVENT_SECONDS", 0.0)
    served = Served(load_tiny()).wait_ready()
    served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    whole, jobs = served.chat(LONG).json(), served.app.state.server.jobs
    asked = {"messages": [{"role": "user", "content": "word " * 20}], "stream": True}
    body = json.dumps(asked | {"stream_options": {"continuous_usage_stats": True}}).encode()
    with monkeypatch.context() as patched, socket.socket() as deaf:
        write_script(patched, served, "a) sells 1\n" * 200)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect((served.client.base_url.host, served.client.base_url.port))
        deaf.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body)
        wait_for(lambda: len(jobs) == 1)
        wait_for(lambda: served.worker.accepted == 0)
        patched.undo()
        time.sleep(0.3)
        assert len(jobs) == 1  # all is decoded, and not all is sent
        assert served.chat(LONG).json()["choices"] == whole["choices"]
        deaf.settimeout(20)
        received = b""
        while b"data: [DONE]" not in received:
            received += deaf.recv(65536)
        assert received.count(b'"finish_reason":"length"') + received.count(b'"finish_reason":"stop"') == 1
        wait_for(lambda: jobs == {})
    served.close()
