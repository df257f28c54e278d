"""`sbtiny serve` as a person starts and stops it."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sbtiny.cli import main as cli
from sbtiny.cli.serve import listen
from sbtiny.tasks import arithmetic

LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
CHAT = "/v1/chat/completions"


class Command:
    """A running `sbtiny serve`, its greeting and its address."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "sbtiny", "serve", *arguments, "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("curl "):
                break
        self.url = next((line.split()[0] for line in self.lines if line.startswith("http")), "")

    def leave(self, *signals: int) -> int:
        for each in signals:
            self.process.send_signal(each)
        return self.process.wait(60)


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
    assert code in (0, -signal.SIGTERM)
    assert texts.count("data: [DONE]") == 5
    assert sum('"stop_reason":"end"' in line for line in texts) == 5
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{tiny.url}/health")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--host", "0.0.0.0"], "--api-key"),
        (["tiny", "--host", "::"], "--no-auth"),
        (["tiny", "--api-key", " "], "--api-key is empty"),
        (["tiny", "--host", "256.1.1.1", "--no-auth"], "cannot listen on"),
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
