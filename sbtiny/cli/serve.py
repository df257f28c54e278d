"""`sbtiny serve`: an OpenAI-compatible server for one model."""

import socket
import sys
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import UPSTREAM, USE, Flags, start_work, with_flags
from sbtiny.errors import InputError

NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


@app.command("serve", rich_help_panel=USE)
@with_flags("config", "preset", "extra", "base", "seed", "four_bit", "backend", "engine", "kv_memory", *UPSTREAM, section="serve")
def serve(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, its name under runs/, a model, or a .gguf file.")],
    host: Annotated[str, typer.Option(help="Address to listen on; another than this machine's wants a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="SBTINY_API_KEY", help="Key that clients must send.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let everyone in who reaches the address.")] = False,
    cors: Annotated[list[str] | None, typer.Option(metavar="ORIGIN", help="Site whose pages may ask; may be given several times.")] = None,
    budget: Annotated[str | None, typer.Option(help="Where a request has none: auto, N tokens, 30s, 0.5x the stated one, or 90%.")] = None,
    ceiling: Annotated[int | None, typer.Option(min=0, help="Tokens that no budget may pass; 0 for none.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Seconds of decoding until an answer is wrapped up; 0 for none.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sampling temperature where a request has none.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Answers decoded at once, at most.")] = None,
    queue: Annotated[int | None, typer.Option(min=1, help="Requests that may wait; further ones get 429.")] = None,
    *,
    flags: Flags,
) -> None:
    """Serve a model to OpenAI's clients: every answer says its budget before it thinks.

    Example: sbtiny serve runs/demo --port 8000
    """
    check_serve_extra()
    from sbtiny.serving.guard import LOOPBACK

    check_exposure(host, host in LOOPBACK, api_key, no_auth)
    own = {"serve.budget": budget, "serve.ceiling": ceiling, "serve.temperature": temperature}
    settings, _, _ = flags.load_for_name(name, own | {"serve.max_num_seqs": slots, "serve.seconds": seconds, "serve.queue": queue})
    listener = listen(host, port)
    start_work(settings)
    from sbtiny.serving.run_server import run_server

    print(f"loading {name} ...", file=sys.stderr, flush=True)
    run_server(name, settings, listener, api_key, cors or (), host in LOOPBACK)


def check_serve_extra() -> None:
    """Raise InputError where a package that a server needs is not installed."""
    if missing := [module for module in NEEDED if find_spec(module) is None]:
        raise InputError(f"a server needs {', '.join(missing)}: pip install 'sbtiny[serve]'")


def check_exposure(host: str, is_local: bool, api_key: str | None, no_auth: bool) -> None:
    if api_key is not None and not api_key.strip():
        raise InputError("--api-key is empty: give a key")
    if not is_local and api_key is None and not no_auth:
        raise InputError(f"--host {host} opens the server to others: give --api-key KEY, or --no-auth to let everyone in")


def listen(host: str, port: int) -> Any:
    """A socket on the address, taken before a model is loaded for minutes. Raises InputError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no address can have, such as a..b
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host}:{port} ({why}): use another --host or --port") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the first event waits 40 ms for the header's delayed ACK
    return listener
