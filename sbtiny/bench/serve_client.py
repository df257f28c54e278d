"""Sends requests to a running server, each at its time whatever became of the others, and takes down when what came.

Runs in a process of its own: in the server's it would wait for the same interpreter. Imports nothing heavy.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from sbtiny.errors import Failed

PATH = "/v1/chat/completions"
LEAD = 0.2  # seconds before the first request, so that the tasks of all are there


@dataclass(slots=True)
class RequestTiming:
    """Seconds on one clock. `due`: when it should be sent; times count from there, so that a late client hides nothing."""

    due: float
    budget_at: float = 0.0
    ended: float = 0.0
    queued: float = 0.0  # in the server's queue, as it tells
    service: float = 0.0  # of its body in a slot, as it tells
    tokens: int = 0
    stated: int | None = None

    @property
    def total(self) -> float:
        return self.ended - self.due

    @property
    def until_budget(self) -> float:
        return self.budget_at - self.due


def send_requests(url: str, bodies: Sequence[dict[str, Any]], times: Sequence[float]) -> list[RequestTiming]:
    return asyncio.run(send_all(url, bodies, times))


async def send_all(url: str, bodies: Sequence[dict[str, Any]], times: Sequence[float]) -> list[RequestTiming]:
    """Send each at its time, in seconds from now on. Raises Failed where one is not answered."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        begun = time.perf_counter() + LEAD
        return await asyncio.gather(*(send(client, body, begun + at) for body, at in zip(bodies, times, strict=True)))


async def send(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> RequestTiming:
    """Send one request and read its stream. Only its first event and the last ones are parsed."""
    timing = RequestTiming(due)
    await asyncio.sleep(due - time.perf_counter())
    async with client.stream("POST", PATH, json=body) as response:
        if response.status_code != 200:
            raise Failed(f"the server answered {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                read_event(timing, line)
    if not timing.ended:
        raise Failed("an answer broke off: the decoder has crashed")
    return timing


def read_event(timing: RequestTiming, line: str) -> None:
    if not timing.budget_at:
        timing.budget_at = time.perf_counter()
        budget = json.loads(line[6:]).get("budget") or {}
        stated, given = budget.get("predicted"), budget.get("requested")
        timing.stated = given if isinstance(given, int) else stated
    if '"metrics":{' in line:
        event = json.loads(line[6:])
        timing.queued = event["metrics"]["queue_time_ms"] / 1000
        timing.service = event["timings"]["predicted_ms"] / 1000  # the wait is not in it
    if '"usage":{' in line:
        timing.tokens, timing.ended = json.loads(line[6:])["usage"]["completion_tokens"], time.perf_counter()
