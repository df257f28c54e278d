"""`sbtiny serve` as a person starts and stops it."""

import json
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_support import Command

from sbtiny.cli import main as cli
from sbtiny.cli.serve import listen
from sbtiny.tasks import arithmetic

LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
CHAT = "/v1/chat/completions"


@pytest.fixture
def tiny() -> Iterator[Command]:
    command = Command("tiny", "--slots", "2", "--set", "serve.temperature=0")
    yield command
    command.process.kill()
    command.process.wait()


def test_what_it_sends_does_not_wait_for_an_acknowledgement() -> None:
    """Asyncio sets this for sockets that it makes itself alone."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_it_greets_answers_its_own_curl_and_finishes_what_runs(tiny: Command) -> None:
    assert f"{tiny.url} serves tiny" in tiny.lines[-2]
    assert "2 slots" in tiny.lines[-2]
    words = shlex.split(tiny.lines[-1])
    answer = httpx.post(words[1], content=words[words.index("-d") + 1], timeout=60)
    assert answer.json()["choices"][0]["message"]["content"]
    body = {"messages": [{"role": "user", "content": LONG}], "stream": True}
    texts: list[str] = []

    def read() -> None:
        with httpx.stream("POST", tiny.url + CHAT, json=body, timeout=60) as response:
            for line in response.iter_lines():
                texts.append(line)
                begun.set()

    begun = threading.Event()
    threads = [threading.Thread(target=read) for _ in range(5)]  # three of them wait
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    code = tiny.leave(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert code == 0
    assert texts.count("data: [DONE]") == 5
    assert sum('"stop_reason":"end"' in line for line in texts) == 5
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{tiny.url}/health")


def test_what_outlasts_the_grace_is_told_that_it_stops() -> None:
    """Also where a client does not read, which would keep it for ever."""
    command = Command("tiny", "--slots", "1", "--set", "serve.temperature=0", "--set", "serve.grace=0.5")
    body = {"messages": [{"role": "user", "content": LONG}], "stream": True}
    ends: list[list[str]] = []

    def read() -> None:
        with httpx.stream("POST", command.url + CHAT, json=body, timeout=60) as response:
            begun.wait(60)
            ends.append([line for line in response.iter_lines() if line.startswith("data: ")][-2:])

    begun = threading.Barrier(41)
    threads = [threading.Thread(target=read) for _ in range(40)]
    with socket.create_connection(command.url.removeprefix("http://").split(":")) as deaf:
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        for thread in threads:
            thread.start()
        begun.wait(60)
        assert command.leave(signal.SIGTERM) == 0
    for thread in threads:
        thread.join(30)
    assert len(ends) == 40
    assert {done for _, done in ends} == {"data: [DONE]"}
    told = [json.loads(last.removeprefix("data: ")) for last, _ in ends]
    stopped = [chunk["error"] for chunk in told if "error" in chunk]
    assert {(error["code"], error["type"]) for error in stopped} == {("stopped", "server_error")}
    assert all(chunk["choices"][0]["stop_reason"] == "end" for chunk in told if "error" not in chunk)


def test_a_second_ctrl_c_leaves_at_once(tiny: Command) -> None:
    with socket.create_connection(tiny.url.removeprefix("http://").split(":")) as deaf:
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        began = time.monotonic()
        tiny.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert tiny.leave(signal.SIGINT) in (130, -signal.SIGINT)  # the same to a shell
        assert time.monotonic() - began < 20  # of a grace of 25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--host", "0.0.0.0"], "--api-key"),
        (["tiny", "--host", "::"], "--no-auth"),
        (["tiny", "--api-key", " "], "--api-key is empty"),
        (["tiny", "--host", "256.1.1.1", "--no-auth"], "cannot listen on"),
        (["tiny", "--host", "a..b", "--no-auth"], "cannot listen on a..b"),
        (["no-such-model-here"], "no-such-model-here"),
        (["tiny", "--budget", "many", "--port", "0"], "such as 90%"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["serve", *arguments], debug=False) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.run(["serve", "tiny", "--port", str(taken.getsockname()[1])], debug=False) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from sbtiny.cli import serve

    monkeypatch.setattr(serve, "NEEDED", ("no_such_module",))
    assert cli.run(["serve", "tiny"], debug=False) == 2
    assert "pip install 'sbtiny[serve]'" in capsys.readouterr().err


def test_an_unfinished_run_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["serve", str(tmp_path / "nothing")], debug=False) == 2
    assert "error: " in capsys.readouterr().err
