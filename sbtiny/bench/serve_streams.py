"""What serving costs: the same questions as streams of a server, all at once, and as one closed loop, by turns."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from sbtiny.bench.lengths import summarize
from sbtiny.bench.machine import describe_machine
from sbtiny.bench.serve import SEEDS, start_server
from sbtiny.bench.serve_client import send_requests
from sbtiny.config import Settings
from sbtiny.models.prompt import to_messages
from sbtiny.serving import assistant as assistants
from sbtiny.serving.assistant import Assistant
from sbtiny.tasks import arithmetic

MOST_TOKENS = 512  # of one answer


def compare_with_closed_loop(
    name: str, settings: Settings, slots: int, requests: int, rounds: int, seed: int, advance: Callable[..., None] = lambda *_: None
) -> dict[str, Any]:
    """Measure tokens a second of `requests` streams on `slots` slots, and of the closed loop; the ratio by round, median and range."""
    closed = assistants.load(name, settings=replace(settings, serve=replace(settings.serve, max_num_seqs=slots)))
    speeds: dict[str, list[float]] = {"served": [], "closed": []}
    tokens: dict[str, list[int]] = {"served": [], "closed": []}
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client,
        start_server(name, settings, slots, requests) as (url, _),
    ):
        ways = {
            "served": lambda work: client.submit(measure_streams, url, work).result(),
            "closed": lambda work: measure_closed_loop(closed, work),
        }
        for turn in range(-1, rounds):  # the first warms up
            work = [
                (q.question, (seed + turn) * SEEDS + i) for i, q in enumerate(arithmetic.generate_questions("val", requests, seed + turn))
            ]
            for way in sorted(ways, reverse=bool(turn % 2)):
                written, seconds = ways[way](work)
                if turn >= 0:
                    speeds[way].append(written / seconds)
                    tokens[way].append(written)
                advance()
    ratios = [served / closed for served, closed in zip(speeds["served"], speeds["closed"], strict=True)]
    result: dict[str, Any] = {"unit": "tokens a second", "slots": slots, "requests": requests, "rounds": rounds, "seed": seed}
    result |= {way: {"speed": statistics.median(speeds[way]), "tokens": sum(tokens[way])} for way in ways}
    return result | {"served_over_closed": summarize(ratios), "machine": describe_machine()}


def measure_streams(url: str, work: list[tuple[str, int]]) -> tuple[int, float]:
    """Send all requests at once. Returns tokens, and seconds from the first request to the last end. Runs in the client's process."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": MOST_TOKENS}
    bodies = [{"messages": [{"role": "user", "content": question}], "seed": seed} | streamed for question, seed in work]
    timings = send_requests(url, bodies, [0.0] * len(bodies))
    return sum(timing.tokens for timing in timings), max(t.ended for t in timings) - min(t.due for t in timings)


def measure_closed_loop(assistant: Assistant, work: list[tuple[str, int]]) -> tuple[int, float]:
    """Sample all answers as training and evaluation do: the server's own requests, limits included. Returns tokens and seconds."""
    begun = time.perf_counter()
    replies = [
        assistant.begin(to_messages(question), replace(assistant.defaults, seed=seed, max_tokens=MOST_TOKENS)) for question, seed in work
    ]
    requests = [reply.body.request for reply in replies]
    for reply in replies:
        assistant.drop(reply)
    episodes = assistant.policy.sample(requests, assistant.defaults.sampling())
    return sum(len(episode.completion_ids) for episode in episodes), time.perf_counter() - begun
