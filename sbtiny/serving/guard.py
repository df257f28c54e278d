"""What stands before every route: the key, other sites' pages, and bodies without end."""

import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.datastructures import Headers

from sbtiny.serving.request_body import MOST_BYTES
from sbtiny.serving.request_error import RequestError, error_body

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
ASGIApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_ROUTES = ("/health",)
MOST_DISCARDED = 256_000_000  # bytes of a body that is too large, read before it is refused: many clients listen only then


class Guard:
    """An ASGI layer. `api_key` None lets everyone in. `cors` are the origins whose pages may ask.

    Without a key, on this machine alone (`is_local`), the address asked for must be this machine's: a page elsewhere may have its name
    point here.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, cors: Sequence[str], is_local: bool) -> None:
        self.app, self.api_key, self.cors, self.is_local = app, api_key, tuple(cors), is_local

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.refuse(scope["path"], scope["method"], Headers(scope=scope))
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, message, code = refusal
        data = json.dumps(error_body(message, status, None, code)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    def refuse(self, path: str, method: str, headers: Headers) -> tuple[int, str, str] | None:
        """Status, message and code where a request may not pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.is_local and self.api_key is None and name_of(host) not in LOOPBACK:
            return 403, f"this server answers on {LOOPBACK[0]} alone: {name_of(host)[:60]!r} is another address", "wrong_host"
        if origin is not None and origin not in self.cors and "*" not in self.cors and urlsplit(origin).netloc != host:
            return 403, "pages of other sites may not ask: start with --cors ORIGIN to let one", "wrong_origin"
        if path in OPEN_ROUTES or self.api_key is None or (method == "OPTIONS" and origin is not None):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), self.api_key.encode()):
            return None
        return 401, "this server wants its key: send Authorization: Bearer KEY", "invalid_api_key"


def name_of(host: str) -> str:
    """The name of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def read_bounded(request: Request) -> bytes:
    """Read a body. Raises RequestError for one that is too large, after it was read and thrown away."""
    data, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MOST_BYTES:
            data += part
        elif size > MOST_DISCARDED:
            break
    if size > MOST_BYTES:
        raise RequestError(f"the body has more than {MOST_BYTES} bytes", code="too_large", status=413)
    return bytes(data)
