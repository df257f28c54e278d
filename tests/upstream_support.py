"""Servers that answer elsewhere: a real llama-server and vLLM where there are such, and what plays ollama."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic

VLLM_SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")  # the `vllm` of a CPU build asks for another package
START_SECONDS = 900  # vLLM's on a busy machine
VLLM_ON_A_CPU = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--gpu-memory-utilization", "0.15")
Made = tuple[Any, int | None]  # a request, and the tokens after which the answer is asked for


class ServerProcess:
    """A server of a model in a process of its own, on a free port."""

    def __init__(self, *command: str, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            wait_for(self.is_ready, START_SECONDS)
        except BaseException:
            self.close()
            raise

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.ConnectError:
            return False

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # vLLM's engine is another process of its group
        self.process.wait()


class LlamaServer(ServerProcess):
    """llama-server of a GGUF file; skips where SBTINY_LLAMA_SERVER and PATH have none."""

    def __init__(self, file: Path, slots: int = 8, *options: str) -> None:
        program = os.environ.get("SBTINY_LLAMA_SERVER") or shutil.which("llama-server")
        if not program:
            pytest.skip("needs llama-server: set SBTINY_LLAMA_SERVER")
        super().__init__(program, "-m", str(file), "-t", "1", "-tb", "1", "-np", str(slots), "-c", str(1024 * slots), *options)


class VllmServer(ServerProcess):
    """vLLM's server of a model's folder; skips where it is not installed."""

    def __init__(self, folder: Path, *options: str) -> None:
        pytest.importorskip("vllm")
        # Bound to one core, its worker crawls where others compute there too.
        super().__init__(*VLLM_SERVE, str(folder), *VLLM_ON_A_CPU, *options, VLLM_CPU_OMP_THREADS_BIND="nobind")


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


class FakeOllama:
    """ollama's routes by its documentation. `answer` makes the pieces of text after a raw prompt; `status` is that of its answers."""

    def __init__(self, tokens: int, answer: Callable[[str, int], list[str]], status: int = 200) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {"/api/version": {"version": "0.30.0"}, "/api/tags": {"models": [{"name": "mine:latest"}]}}
                self.reply(200 if self.path in known else 404, [known.get(self.path, {})])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/api/show":
                    return self.reply(200, [{"model_info": {"tokenizer.ggml.tokens": ["x"] * tokens}}])
                asked.append(body)
                if status != 200:
                    return self.reply(status, [{"error": "not now"}])
                most = body["options"]["num_predict"]
                pieces = answer(body["prompt"], most)
                rows = [{"model": body["model"], "response": piece, "done": False} for piece in pieces]
                self.reply(200, [*rows, {"response": "", "done": True, "done_reason": "length" if len(pieces) == most else "stop"}])

            def reply(self, status: int, rows: list[dict[str, Any]]) -> None:
                self.send_response(status)
                self.end_headers()
                with suppress(ConnectionError):  # the reader has closed the stream
                    self.wfile.write("".join(json.dumps(row) + "\n" for row in rows).encode())

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def make_requests(policy: Policy, count: int) -> list[Made]:
    """Requests of every kind of limit: a ceiling, a tolerance, a given budget, an answer now, none."""
    wrap_up = tuple(policy.encode("\n\nTime is up. \\boxed{"))
    limits = [(None, 0.5), (12, None), (None, 0.1), (7, None), (300, None)]
    made = []
    for i, q in enumerate(arithmetic.generate_questions("val", count)):
        kind = i % len(limits)
        chosen = Limits(*limits[kind], wrap_up, 40)
        request = policy.request(q.question, 120, i, budget=20 if kind == 2 else None, limits=chosen, interrupt=Interrupt())
        made.append((request, 2 + i % 9 if kind == 4 else None))
    return made


def play_requests(policy: Policy, made: list[Made], sampling: Any) -> list[Any]:
    """Decode all at once; each answer is asked for when so many of its tokens stand. Returns the episodes."""
    session = policy.engine.open_session(512)
    tickets = [session.add(request, sampling) for request, _ in made]
    for ticket, (_, moment) in zip(tickets, made, strict=True):
        ticket.append = press_at(ticket, moment)
    while session.is_busy:
        session.step()
    if refusals := [ticket.refusal for ticket in tickets if ticket.refusal]:
        raise refusals[0]
    return [ticket.episode for ticket in tickets]


def press_at(ticket: Any, moment: int | None) -> Callable[..., Any]:
    append = ticket.append

    def counted(*token: Any) -> Any:
        if len(ticket.written) == moment:
            ticket.request.interrupt.press()
        return append(*token)

    return counted
