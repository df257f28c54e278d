"""The streams of all upstream servers, read by one thread into one queue: the decode loop takes what is there, no socket holds it up."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import httpx

from sbtiny.errors import UpstreamError
from sbtiny.rollout.engines.upstream_balance import Upstream
from sbtiny.rollout.engines.upstream_dialects import Chunk, Segment, error_text
from sbtiny.rollout.session import Ticket

CONNECT_SECONDS, READ_SECONDS = 5.0, 120.0  # the second: between two chunks, beside the time of the prompt
LEAST_PREFILL = 50  # tokens of a prompt that a server reads in a second, at the least
GATHER_SECONDS = 0.002  # a step of many answers costs as much as one of few
OF_THE_REQUEST = (400, 413, 422)  # statuses of a request that no other server would take either; 401, 408 or 429 are one server's own


@dataclass(eq=False)
class Stream:
    """One request at a server for a part of a ticket's answer. `shown`: tokens of it that came; `begun_at`: those written before it."""

    ticket: Ticket
    upstream: Upstream
    segment: Segment
    begun_at: int
    shown: int = 0
    task: Future[None] | None = field(default=None, repr=False)


News = tuple[Stream, Chunk | UpstreamError]


class StreamReader:
    """Reads streams in a thread of its own. `headers`, with the key, go with every request, and nowhere else."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.news: SimpleQueue[News] = SimpleQueue()
        headers = {"Accept-Encoding": "identity"} | headers  # it is read as it comes
        self.client = httpx.AsyncClient(headers=headers, limits=httpx.Limits(), trust_env=False)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="sbtiny-upstream", daemon=True)
        self.thread.start()

    def open(self, stream: Stream) -> None:
        stream.task = asyncio.run_coroutine_threadsafe(self._read(stream), self.loop)

    def close(self, stream: Stream) -> None:
        """Close a stream, so that its server stops. What has come of it already may still be taken."""
        stream.task.cancel()

    def take(self, seconds: float, gathers: bool) -> Iterator[News]:
        """All that has come; waits so long for the first, and a moment for others to come with it where it `gathers`."""
        try:
            yield self.news.get(timeout=seconds)
            if gathers:
                time.sleep(GATHER_SECONDS)
            while True:
                yield self.news.get_nowait()
        except Empty:
            return

    def stop(self) -> None:
        """End the thread."""
        asyncio.run_coroutine_threadsafe(self.client.aclose(), self.loop).result(CONNECT_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(CONNECT_SECONDS)
        self.loop.close()

    async def _read(self, stream: Stream) -> None:
        upstream = stream.upstream
        try:
            await self._read_chunks(stream)
        except UpstreamError as error:
            self.news.put((stream, UpstreamError(f"upstream {upstream.url}: {error}", error.is_refusal)))
        except Exception as error:  # whatever it is, who waits for the stream must be told
            reason = str(error) or type(error).__name__
            self.news.put((stream, UpstreamError(f"upstream {upstream.url} has failed in an answer ({reason})")))

    async def _read_chunks(self, stream: Stream) -> None:
        dialect, segment = stream.upstream.dialect, stream.segment
        url, timeout = stream.upstream.url + dialect.path, timeout_for(len(segment.prompt))
        async with self.client.stream("POST", url, json=dialect.body(segment), timeout=timeout) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise UpstreamError(f"HTTP {response.status_code}, {read_error(text)}", response.status_code in OF_THE_REQUEST)
            rest = b""
            async for part in response.aiter_raw():  # httpx's own lines take three times as long
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if (chunk := dialect.read(line)) is not None:
                        self.news.put((stream, chunk))
                        if chunk.end:
                            return
        raise UpstreamError("its stream ended in the middle of an answer")


def timeout_for(prompt_tokens: int = 0) -> httpx.Timeout:
    """How long to wait for a server: while it reads a long prompt it says nothing."""
    return httpx.Timeout(READ_SECONDS + prompt_tokens / LEAST_PREFILL, connect=CONNECT_SECONDS, pool=None)


def read_error(text: str) -> str:
    """What the body of a refusal says, whether it is JSON or not."""
    try:
        return error_text(json.loads(text))
    except ValueError:
        return error_text(text)
