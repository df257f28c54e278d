"""What stands before every route: the key, other sites' pages, and bodies without end."""

import base64
import binascii
import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.datastructures import Headers
from starlette.requests import ClientDisconnect

from sbtiny.serving.request_error import CLIENT_GONE, RequestError, error_body

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
ASGIApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_ROUTES = ("/health",)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing
SINGLE_HEADERS = ("host", "origin", "authorization")  # of two of them, a proxy before this server might have checked the other
MOST_BYTES = 1_000_000  # of a body
MOST_DISCARDED = 256_000_000  # bytes of a body that is too large, read before it is refused: many clients listen only then


class Guard:
    """An ASGI layer. `api_key` None lets everyone in. `cors` are the origins whose pages may ask.

    The key comes as `Authorization: Bearer KEY`, or as the password of Basic, which a browser asks its user for at `/` and then sends by
    itself, for pages of other sites too. So two things hold for Basic alone: what changes something must come from this server's own
    page, or from an origin that `cors` names ("*" names none); and on this machine alone (`is_local`) the address asked for must be this
    machine's, for a page elsewhere may have its name point here. That address is wanted of everyone where there is no key.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, cors: Sequence[str], is_local: bool) -> None:
        self.app, self.api_key, self.cors, self.is_local = app, api_key, tuple(cors), is_local

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope)
        refusal = self.refuse(scope["path"], scope["method"], given)
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, message, code = refusal
        data = json.dumps(error_body(message, status, None, code)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        if status == 401:  # Basic lets a browser ask for the key, which it must not do at each request of the page's script
            is_asked = scope["path"] == "/" and self._is_here(given)
            headers.append((b"www-authenticate", b'Basic realm="sbtiny"' if is_asked else b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    def refuse(self, path: str, method: str, headers: Headers) -> tuple[int, str, str] | None:
        """Status, message and code where a request may not pass."""
        if doubled := [name for name in SINGLE_HEADERS if len(headers.getlist(name)) > 1]:
            return 400, f"the header {doubled[0]} comes more than once: send one", "ambiguous_header"
        host, (scheme, key) = name_of(f"//{headers.get('host', '')}")[0], read_key(headers.get("authorization", ""))
        is_basic = self.api_key is not None and scheme == "basic"
        if (self.api_key is None or is_basic) and not self._is_here(headers):
            return 403, f"this server answers on {LOOPBACK[0]} alone: {host[:60]!r} is another address", "wrong_host"
        is_named = "*" in self.cors and (method in SAFE_METHODS or not is_basic)
        if not is_named and not self._is_own_page(headers):
            return 403, "pages of other sites may not ask: start with --cors ORIGIN to let one", "wrong_origin"
        if path in OPEN_ROUTES or self.api_key is None or (method == "OPTIONS" and "origin" in headers):
            return None
        if key and secrets.compare_digest(key, self.api_key.strip().encode()):
            return None
        return 401, "this server wants its key: send Authorization: Bearer KEY", "invalid_api_key"

    def _is_here(self, headers: Headers) -> bool:
        """Whether the address asked for is this machine's, where the server listens on it alone."""
        return not self.is_local or name_of(f"//{headers.get('host', '')}")[0] in LOOPBACK

    def _is_own_page(self, headers: Headers) -> bool:
        """Whether no page asks, or this server's own, or one that is named."""
        origin = headers.get("origin")
        return origin is None or origin in self.cors or (name_of(origin)[1] or None) == headers.get("host", "")


def name_of(address: str) -> tuple[str, str]:
    """The name in an address, and the name with its port; empty where there is none."""
    try:
        parts = urlsplit(address)
        return parts.hostname or "", parts.netloc
    except ValueError:  # of brackets that do not close
        return "", ""


def read_key(authorization: str) -> tuple[str, bytes]:
    """The scheme of an Authorization header in small letters, and the key in it: Basic's password. An empty key is none."""
    scheme, _, value = authorization.partition(" ")
    key = value.encode("latin-1")  # how the header's bytes were read
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            key = b""
    return scheme.lower(), key.strip() if scheme.lower() in ("basic", "bearer") else b""


async def read_bounded(request: Request) -> bytes:
    """Read a body. Raises RequestError for one that is too large, after it was read and thrown away, and for half a one."""
    data, size = bytearray(), 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= MOST_BYTES:
                data += part
            elif size > MOST_DISCARDED:
                break
    except ClientDisconnect as error:
        raise RequestError("the client has gone in the middle of its body", status=CLIENT_GONE) from error
    if size > MOST_BYTES:
        raise RequestError(f"the body has more than {MOST_BYTES} bytes", code="too_large", status=413)
    return bytes(data)
