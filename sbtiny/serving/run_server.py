"""Run the server in this thread until it is told to stop, and greet the person who started it."""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from sbtiny.config import Settings
from sbtiny.errors import Failed, InputError
from sbtiny.serving import assistant as assistants
from sbtiny.serving.app import create_app
from sbtiny.serving.ask import explain_no_promise
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import add_head_rows
from sbtiny.serving.worker import Worker

TOLD_SECONDS = 5  # for the last events to be read, before the connections are cut


class DrainingServer(uvicorn.Server):
    """Told to end, it takes no new requests and lets those that it has go on for `grace` seconds. The rest is told that it stops."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        config.timeout_graceful_shutdown = grace + 2 * TOLD_SECONDS  # the last resort: for ever otherwise
        super().__init__(config)
        self.worker, self.grace = worker, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        later = asyncio.get_running_loop().call_later
        timers = [later(self.grace, self.worker.stop), later(self.grace + TOLD_SECONDS, self._cut_connections)]
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()
        self._cut_connections()

    def _cut_connections(self) -> None:
        """End those whose client does not read: uvicorn takes a cancelled answer for a failed one, and waits to write a 500."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def run_server(name: str, settings: Settings, listener: socket.socket, api_key: str | None, cors: Sequence[str], is_local: bool) -> None:
    """Serve until SIGTERM or Ctrl-C: what runs is finished first, for `serve.grace` seconds. A second Ctrl-C leaves at once.

    Raises InputError for a model that is refused, Failed where loading or decoding has crashed.
    """
    with_heads = add_head_rows(settings)
    worker = Worker(lambda: assistants.load(name, settings=with_heads), settings.serve.queue, settings.serve.seconds)
    app = create_app(worker, Path(name).name, api_key, cors, is_local)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", server_header=False, timeout_keep_alive=30)
    server = DrainingServer(config, worker, settings.serve.grace)
    url = url_of(listener)

    def greet() -> None:
        if worker.decoder is None:
            server.should_exit = True
        else:
            print(greeting(name, url, worker.decoder.assistant, worker.decoder.slots, api_key), file=sys.stderr, flush=True)

    worker.on_ready = greet
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn raises it once more at its end: to end as told is no failure
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
    if isinstance(worker.error, InputError):
        raise worker.error
    if worker.error is not None:
        what = "the model cannot be loaded" if worker.decoder is None else "the decoder has crashed"
        raise Failed(f"{what}: {type(worker.error).__name__}: {worker.error}") from worker.error


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def greeting(name: str, url: str, assistant: Assistant, slots: int, api_key: str | None) -> str:
    """Address, model, promise, slots, and a command to try."""
    settings = assistant.settings
    if assistant.fitting_calibration(assistant.defaults) is not None:
        factor = assistant.calibration.scores.factor(settings.coverage)
        promise = f"calibrated: {settings.coverage:.0%} within " + (f"{factor:.2f}x the stated budget" if factor else "no finite promise")
    elif assistant.calibration is not None:
        promise = explain_no_promise(assistant.calibration, assistant.defaults)
    else:
        promise = "not calibrated" if assistant.policy.states_budget else "states no budget: a given one is a ceiling alone"
    body = json.dumps({"messages": [{"role": "user", "content": "Max has 52 apples.\na) sells 1\nb) buys 2\nHow many apples?"}]})
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    where = [f"decoded by {server}" for server in assistant.policy.engine.servers]
    return f"{url} serves {name} · {' · '.join([promise, f'{slots} slots', *where])}\ncurl {url}/v1/chat/completions{key} -d '{body}'"
