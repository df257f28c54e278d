"""A real server on a real run: in threads of the test's process, or as a person starts it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn

from sbtiny.budget.protocol import SOLUTION, THINK
from sbtiny.config import ServeSettings
from sbtiny.models.load import load_model
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.session import Ticket
from sbtiny.serving.app import create_app
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.serving.worker import Worker

SLOTS = 3


def load_tiny(**settings: object) -> Callable[[], Assistant]:
    """Of the bundled model, which states no budget and reckons at length."""
    chosen = ServeSettings(**{"temperature": 0.0, "context": 512, "max_num_seqs": SLOTS} | settings)
    return lambda: Assistant(build_policy(*load_model("tiny"), slots=SLOTS + HEAD_ROWS, form=SOLUTION, states_budget=False), chosen)


def load_thinking(**settings: object) -> Callable[[], Assistant]:
    """Of the bundled model in the other format: it takes a given budget, and what it writes is thoughts until it is cut."""
    chosen = ServeSettings(**{"temperature": 0.0, "context": 1024, "max_num_seqs": SLOTS, "reserve": 60} | settings)
    return lambda: Assistant(build_policy(*load_model("tiny"), slots=SLOTS + HEAD_ROWS, form=THINK), chosen)


class Served:
    """A server while it runs: its address, its worker, a client."""

    def __init__(self, load: Callable[[], Assistant], most_waiting: int = 64, seconds: float = 0.0, **options: Any) -> None:
        self.worker = Worker(load, most_waiting, seconds)
        self.app = create_app(self.worker, "small", **options)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", access_log=False, ws="none"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        key = options.get("api_key")
        self.client = httpx.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {key}"} if key else {})

    def wait_ready(self) -> "Served":
        wait_for(lambda: self.server.started and self.client.get("/health").status_code == 200)
        return self

    def close(self) -> None:
        self.server.should_exit = True
        self.client.close()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def chat(self, question: str, **body: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": question}]} | body)

    def stream(self, question: str, path: str = "/v1/chat/completions", **body: Any) -> "Stream":
        asked = {"prompt": question} if path.endswith("/v1/completions") else {"messages": [{"role": "user", "content": question}]}
        return Stream(self.client, path, asked | {"stream": True} | body)


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
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


class Stream:
    """A stream of events that is read as it comes. Its comments are kept beside its chunks."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self.context = client.stream("POST", path, json=body)
        self.response = self.context.__enter__()
        self.comments: list[str] = []
        self.is_done = False
        self.chunks = self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        for line in self.response.iter_lines():
            if line.startswith(":"):
                self.comments.append(line)
            elif line == "data: [DONE]":
                self.is_done = True
            elif line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    def all(self) -> list[dict[str, Any]]:
        chunks = list(self.chunks)
        self.close()
        return chunks

    def close(self) -> None:
        self.context.__exit__(None, None, None)


def text_of(chunks: list[dict[str, Any]], name: str = "content") -> str:
    return "".join(c["choices"][0]["delta"].get(name) or "" for c in chunks if c.get("choices"))


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def write_script(monkeypatch: Any, served: Served, text: str) -> list[int]:
    """Make every answer of the server begin with the tokens of a text, as `script_answers` does."""
    return script_answers(monkeypatch, served.worker.decoder.assistant.policy, text)


def script_answers(monkeypatch: Any, policy: Policy, text: str) -> list[int]:
    """Make every answer begin with the tokens of a text, until it is cut, as if they had been sampled. Returns them."""
    script, append = policy.encode(text), Ticket.append

    def append_scripted(ticket: Ticket, token: int, logprob: float | None, stops: Any) -> Any:
        is_cut = ticket.enforcer is not None and any(ticket.enforcer.injected)
        at = len(script) if is_cut else len(ticket.written)
        return append(ticket, script[at] if at < len(script) else token, logprob, stops)

    monkeypatch.setattr(Ticket, "append", append_scripted)
    return script


def slow_down(monkeypatch: Any, served: Served, seconds: float) -> None:
    """Let every step of the server take longer."""
    session = served.worker.decoder.assistant.session
    step = session.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(session, "step", slow_step)
