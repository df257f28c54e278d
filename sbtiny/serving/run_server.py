"""Run the server in this thread until it is told to stop, and greet the person who started it."""

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn

from sbtiny.config import Settings
from sbtiny.errors import Failed, InputError
from sbtiny.rollout.engines.upstream import UpstreamEngine
from sbtiny.serving import assistant as assistants
from sbtiny.serving.app import create_app
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.serving.worker import Worker


def run_server(name: str, settings: Settings, listener: socket.socket, api_key: str | None, cors: Sequence[str], is_local: bool) -> None:
    """Serve until SIGTERM or Ctrl-C: what runs is finished first, a second signal leaves at once.

    Raises InputError for a model that cannot be loaded, Failed where the decoder has crashed.
    """
    rows = settings.serve.max_num_seqs + HEAD_ROWS
    with_heads = replace(settings, serve=replace(settings.serve, max_num_seqs=rows))
    worker = Worker(lambda: assistants.load(name, settings=with_heads), settings.serve.queue, settings.serve.seconds)
    app = create_app(worker, Path(name).name, api_key, cors, is_local)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", server_header=False, timeout_keep_alive=30)
    server = uvicorn.Server(config)
    url = url_of(listener)

    def greet() -> None:
        if worker.decoder is None:
            server.should_exit = True
        else:
            print(greeting(name, url, worker.decoder.assistant, worker.decoder.slots, api_key), file=sys.stderr, flush=True)

    worker.on_ready = greet
    server.run(sockets=[listener])
    if isinstance(worker.error, InputError):
        raise worker.error
    if worker.error is not None:
        raise Failed(f"the decoder has crashed: {type(worker.error).__name__}: {worker.error}") from worker.error


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def greeting(name: str, url: str, assistant: Assistant, slots: int, api_key: str | None) -> str:
    """Address, model, promise, slots, and a command to try."""
    settings, calibration = assistant.settings, assistant.fitting_calibration(assistant.defaults)
    if calibration is not None:
        factor = calibration.scores.factor(settings.coverage)
        promise = f"calibrated: {settings.coverage:.0%} within " + (f"{factor:.2f}x the stated budget" if factor else "no finite promise")
    else:
        promise = "not calibrated" if assistant.policy.states_budget else "states no budget: a given one is a ceiling alone"
    body = json.dumps({"messages": [{"role": "user", "content": "Max has 52 apples.\na) sells 1\nb) buys 2\nHow many apples?"}]})
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    engine = assistant.policy.engine
    where = [f"decoded by {u.dialect.kind} at {u.url}" for u in engine.upstreams] if isinstance(engine, UpstreamEngine) else []
    return f"{url} serves {name} · {' · '.join([promise, f'{slots} slots', *where])}\ncurl {url}/v1/chat/completions{key} -d '{body}'"
