"""Keys, other sites' pages, and what is sent to get past them."""

import base64
import socket
from collections.abc import Iterator

import httpx
import pytest
from fastapi.datastructures import Headers
from serve_support import Served, load_tiny
from test_server_faults import BODY, CHAT, LONG

from sbtiny.serving.guard import Guard

KEY = "sécret key"
ROUTES = ("/", "/v1/models", "/slots", "/metrics", "/openapi.json")
ELSEWHERE = "https://elsewhere.example"


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    served = Served(load_tiny(), api_key="secret-key").wait_ready()
    yield served
    served.close()


def basic(key: str, user: str = "any") -> str:
    return "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()


def judge(path: str = CHAT, method: str = "POST", key: str | None = KEY, cors: tuple[str, ...] = (), is_local: bool = True, **headers: str):
    """The status that the guard refuses with; None where it lets pass."""
    given = {"host": "127.0.0.1:8000"} | headers
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    refusal = Guard(lambda *_: None, key, cors, is_local).refuse(path, method, Headers(raw=raw))
    return refusal and refusal[0]


def test_a_key_is_wanted_everywhere_but_for_health() -> None:
    served = Served(load_tiny(), api_key="secret-key", is_local=False).wait_ready()
    wrong = (
        "Bearer secret-keys",
        "secret-key",
        "Bearer é",
        "Bearer",
        "Basic",
        basic("secret-keys"),
        basic(""),
        "Basic secret-key",
        "Basic !!!!",
    )
    with httpx.Client(base_url=served.url) as stranger:
        for value in (None, *wrong):
            raw = {} if value is None else {"Authorization": value.encode("latin-1")}
            for path in ROUTES:
                assert stranger.get(path, headers=raw).status_code == 401
            refused = stranger.post(CHAT, json=BODY, headers=raw)
            assert refused.json()["error"]["type"] == "authentication_error"
        assert stranger.get("/health").status_code == 200
        for value in (
            "Bearer secret-key",
            basic("secret-key"),
            basic("secret-key", user=""),
            basic("secret-key").replace("Basic", "basic"),
        ):
            for path in ROUTES:
                assert stranger.get(path, headers={"Authorization": value}).status_code == 200
            assert stranger.post(CHAT, json=BODY | {"max_tokens": 2}, headers={"Authorization": value}).status_code == 200
    served.close()


def test_the_page_alone_makes_a_browser_ask_for_the_key(locked: Served) -> None:
    with httpx.Client(base_url=locked.url) as stranger:
        assert stranger.get("/").headers["www-authenticate"] == 'Basic realm="sbtiny"'
        assert stranger.get("/", headers={"Host": "elsewhere.example"}).headers["www-authenticate"] == "Bearer"  # it must not be told there
        for path in ROUTES[1:]:
            assert stranger.get(path).headers["www-authenticate"] == "Bearer"


def test_an_empty_key_opens_nothing() -> None:
    for given in ("Bearer ", "Bearer", "Basic ", basic(""), ""):
        assert judge(key=" ", authorization=given) == 401


def test_a_key_of_any_characters_is_compared_by_its_bytes() -> None:
    assert judge(authorization=f"Bearer {KEY}") is None
    assert judge(authorization=basic(KEY)) is None
    assert judge(authorization=basic("a:b"), key="a:b") is None
    assert judge(authorization=f"Bearer {KEY[:-1]}") == 401


def test_what_changes_something_by_basic_comes_from_the_own_page_or_a_named_one() -> None:
    """A browser sends Basic by itself, also for a form of another site."""
    own = "http://127.0.0.1:8000"
    for origin in (
        ELSEWHERE,
        "null",
        "",
        "http://127.0.0.1:9000",
        "http://localhost:8000",
        "http://127.0.0.1:8000.elsewhere.example",
        "http://[",
    ):
        assert judge(authorization=basic(KEY), origin=origin) == 403
        assert judge(authorization=basic(KEY), origin=origin, cors=("*",)) == 403  # names nobody
        assert judge(authorization=basic(KEY), origin=origin, cors=("https://other.example",)) == 403
    assert judge(authorization=basic(KEY), origin=own) is None
    assert judge(authorization=basic(KEY)) is None  # no page: curl
    assert judge(authorization=basic(KEY), origin=ELSEWHERE, cors=(ELSEWHERE,)) is None
    assert judge(authorization=f"Bearer {KEY}", origin=ELSEWHERE, cors=("*",)) is None  # no browser sends this by itself
    assert judge("/v1/models", "GET", authorization=basic(KEY), origin=ELSEWHERE, cors=("*",)) is None


def test_a_name_that_was_made_to_point_here_gets_nothing() -> None:
    for host in ("elsewhere.example:8000", "127.0.0.1.elsewhere.example", "[::1", "", "127.0.0.1@elsewhere.example", "2130706433"):
        page = {"host": host, "origin": f"http://{host}"}
        assert judge("/v1/models", "GET", key=None, host=host) == 403
        assert judge(**page, authorization=basic(KEY)) == 403
        assert judge(**page) in (401, 403)
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:1"):
        assert judge("/v1/models", "GET", key=None, host=host) is None
        assert judge("/v1/models", "GET", host=host, authorization=basic(KEY)) is None
    assert judge(host="proxy.example", authorization=f"Bearer {KEY}") is None  # by a proxy, which the key is told
    assert judge(host="server.example", authorization=basic(KEY), is_local=False) is None


def exchange(served: Served, head: bytes) -> bytes:
    """The first line of the answer to raw bytes; nothing where the connection was closed."""
    with socket.create_connection(("127.0.0.1", served.client.base_url.port), timeout=30) as raw:
        try:
            raw.sendall(head)
            return raw.recv(4096).partition(b"\r\n")[0]
        except ConnectionError:
            return b""


@pytest.mark.parametrize(
    "header",
    [
        b"Authorization: Bearer secret-key\r\nAuthorization: Bearer other",
        b"Authorization: Bearer other\r\nAuthorization: Bearer secret-key",
        b"Host: localhost\r\nAuthorization: Bearer secret-key",
        b"Origin: http://localhost\r\nOrigin: https://elsewhere.example\r\nAuthorization: Bearer secret-key",
        b"Authorization: Bearer secret-key\x00",
        b"Authorization: Bearer \x00secret-key",
        b"Authorization: Bearer " + b"k" * 100_000,
        b"Authorization: Basic " + base64.b64encode(b"u:" + b"k" * 75_000),
        b"Authorization : Bearer secret-key",
    ],
    ids=["right first", "right last", "two hosts", "two origins", "nul behind", "nul before", "100 kB", "100 kB of Basic", "space"],
)
def test_headers_that_are_not_as_they_should_be_are_refused(locked: Served, header: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n"
    assert exchange(locked, head % b"Authorization: Bearer secret-key").startswith(b"HTTP/1.1 200")
    answer = exchange(locked, head % header)
    assert answer == b"" or answer.split()[1] in (b"400", b"401", b"431")
    assert locked.chat(LONG, max_tokens=2).status_code == 200


def test_pages_of_other_sites_may_not_ask_unless_named(plain: Served) -> None:
    other = {"Origin": ELSEWHERE}
    assert plain.client.post(CHAT, json=BODY, headers=other).status_code == 403
    assert plain.client.get("/v1/models", headers={"Host": "elsewhere.example"}).status_code == 403
    assert plain.client.get("/v1/models", headers={"Origin": "http://["}).status_code == 403
    assert plain.client.get("/v1/models", headers={"Origin": plain.url}).status_code == 200
    assert "access-control-allow-origin" not in plain.client.get("/v1/models", headers={"Origin": plain.url}).headers
    named = Served(load_tiny(), cors=[ELSEWHERE]).wait_ready()
    assert named.client.get("/v1/models", headers=other).headers["access-control-allow-origin"] == other["Origin"]
    named.close()
