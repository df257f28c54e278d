"""The server, measured: an open loop of real requests over a socket, in our order, first come first served, and by an oracle.

Every order gets the same requests at the same times with the same seeds, so that the answers are the same and only their order differs.
Beside each stands what the simulated queue makes of these arrivals and lengths.
"""

import multiprocessing
import socket
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvicorn

from sbtiny.bench.lengths import summarize
from sbtiny.bench.machine import describe_machine
from sbtiny.bench.serve_client import RequestTiming, send_requests
from sbtiny.bench.serve_simulation import Arrivals, ServeLoad, draw_arrivals, measure, over
from sbtiny.config import Settings
from sbtiny.errors import Failed, InputError
from sbtiny.rollout.limits import Limits
from sbtiny.serving import assistant as assistants
from sbtiny.serving.answer_limits import Limiter
from sbtiny.serving.app import create_app
from sbtiny.serving.heads_first import add_head_rows
from sbtiny.serving.queue import rank_first_come, rank_oracle
from sbtiny.serving.reply import Reply
from sbtiny.serving.run_server import url_of
from sbtiny.serving.worker import Worker
from sbtiny.tasks import arithmetic

Send = Callable[[list[dict[str, Any]], list[float]], list[RequestTiming]]  # bodies, seconds from now on
ORDERS = ("fcfs", "ours", "oracle")
MOST_TOKENS = 2_000  # of one answer
SEEDS = 100_000  # between the seeds of two rounds


@dataclass(frozen=True, slots=True)
class ServePlan:
    """`load` without `sigma`: lengths as the model writes them. `mean`: tokens of an answer where lengths are drawn."""

    load: ServeLoad
    draws_lengths: bool
    mean: int = 60


@contextmanager
def start_server(name: str, settings: Settings, slots: int, most_waiting: int) -> Iterator[tuple[str, Worker]]:
    """Serve in threads of this process, on a free port of this machine. Raises InputError for a model that cannot be loaded."""
    serve = replace(settings.serve, max_num_seqs=slots, given_tolerance=MOST_TOKENS)  # drawn lengths are no budget's to cut
    with_heads = add_head_rows(replace(settings, serve=serve))
    loaded = threading.Event()
    worker = Worker(lambda: assistants.load(name, settings=with_heads), most_waiting, on_ready=loaded.set)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(create_app(worker, "bench"), log_level="error", access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not loaded.wait(1.0):
            if not thread.is_alive():
                raise Failed("the server of the bench has ended before it was ready")
        if worker.error is not None:
            raise worker.error if isinstance(worker.error, InputError) else Failed(f"the model could not be loaded: {worker.error}")
        yield url_of(listener), worker
    finally:
        server.should_exit = True
        thread.join(60)


class DrawnLengths(Limiter):
    """Ends an answer at the length that was drawn for its seed. The server knows only its budget: `max_tokens` would cap that."""

    drawn: dict[int, int]

    def limits(self, reply: Reply, budget: int | None) -> tuple[Limits, int]:
        return super().limits(reply, budget)[0], self.drawn[reply.ask.seed]


def make_requests(plan: ServePlan, arrivals: Arrivals) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """The bodies of the requests, and the drawn lengths by their seeds. What a length would have stated is a given budget."""
    load = plan.load
    questions = arithmetic.generate_questions("val", load.requests, seed=load.seed)
    bodies, drawn = [], {}
    for i, question in enumerate(questions):
        body = {"messages": [{"role": "user", "content": question.question}], "seed": load.seed * SEEDS + i}
        if plan.draws_lengths:
            drawn[body["seed"]] = min(MOST_TOKENS, max(4, round(plan.mean * arrivals.lengths[i])))
            body |= {"budget": max(1, round(plan.mean * arrivals.stated[i]))}
        bodies.append(body | {"stream": True, "stream_options": {"include_usage": True}})
    return bodies, drawn


def measure_orders(send: Send, worker: Worker, plan: ServePlan, advance: Callable[..., None]) -> dict[str, Any]:
    """Figures of each order on one draw of requests, in seconds, and the simulation's in mean services."""
    load = plan.load
    arrivals = draw_arrivals(load if plan.draws_lengths else replace(load, sigma=0.0))
    (bodies, drawn), heads_first = make_requests(plan, arrivals), worker.decoder.bodies
    if plan.draws_lengths:
        worker.decoder.assistant.limiter.drawn = drawn
    heads_first.rank = make_rank("fcfs", {})
    alone = send(bodies, [0.0] * len(bodies))  # warms up, and tells lengths and services
    advance()
    mean_tokens = statistics.mean(timing.tokens for timing in alone)
    service = statistics.mean(timing.service for timing in alone)  # with what others' prompts take from it, which is load too
    times = [at * service for at in arrivals.times]
    lengths = {body["seed"]: timing.tokens for body, timing in zip(bodies, alone, strict=True)}
    turn = load.seed % len(ORDERS)
    figures: dict[str, Any] = {}
    for order in ORDERS[turn:] + ORDERS[:turn]:
        heads_first.rank = make_rank(order, lengths)
        figures[order] = compute_figures(send(bodies, times), load.slots)
        advance()
    stated = [timing.stated or mean_tokens for timing in alone]
    scale = statistics.mean(stated)
    replayed = Arrivals(arrivals.times, [n / mean_tokens for n in lengths.values()], [n / scale for n in stated])
    return {"orders": figures, "simulated": measure(replayed, load), "service": service, "mean_tokens": mean_tokens}


def make_rank(order: str, lengths: dict[int, int]) -> Callable[[Reply], float] | None:
    """What the queue sorts by; None is the server's own order. `lengths`: true tokens by the request's seed."""
    if order == "ours":
        return None
    rank = rank_first_come if order == "fcfs" else rank_oracle
    return lambda reply: rank(reply.budget or 0.0, lengths.get(reply.ask.seed, 0), reply.started)


def compute_figures(timings: Sequence[RequestTiming], slots: int) -> dict[str, float]:
    """Times in the system and until the budget in seconds; tokens a second, and the busy share of the slots, until the last end."""
    times, budgets = ([getattr(timing, name) for timing in timings] for name in ("total", "until_budget"))
    seconds = max(timing.ended for timing in timings) - min(timing.due for timing in timings)
    (p50, p99), (budget_p50, budget_p99) = np.percentile(times, [50, 99]), np.percentile(budgets, [50, 99])
    figures = {"mean": statistics.mean(times), "p50": p50, "p99": p99, "longest": max(times)}
    figures |= {"longest_wait": max(timing.queued for timing in timings), "budget_p50": budget_p50, "budget_p99": budget_p99}
    figures |= {"tokens_per_second": sum(timing.tokens for timing in timings) / seconds}
    figures |= {"busy": sum(timing.service for timing in timings) / (slots * seconds)}
    return {key: float(value) for key, value in figures.items()}


def compare_served_orders(
    name: str, settings: Settings, plan: ServePlan, rounds: int = 1, advance: Callable[..., None] = lambda *_: None
) -> dict[str, Any]:
    """Serve a model and measure each order: medians over the rounds, and ratios over first come first served (median and range)."""
    load, runs = plan.load, []
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client,
        start_server(name, settings, load.slots, load.requests) as (url, worker),
    ):
        if plan.draws_lengths:  # an answer ends at its drawn length alone
            assistant = worker.decoder.assistant
            assistant.policy.engine.stops = np.zeros_like(assistant.policy.engine.stops)
            assistant.limiter = DrawnLengths(assistant.policy, assistant.limiter.settings, assistant.context)
        for turn in range(rounds):
            seeded = replace(plan, load=replace(load, seed=load.seed + turn))
            runs.append(measure_orders(lambda *work: client.submit(send_requests, url, *work).result(), worker, seeded, advance))
    result: dict[str, Any] = {"unit": "seconds", "slots": load.slots, "load": load.load, "requests": load.requests, "rounds": rounds}
    result |= {"sigma": load.sigma if plan.draws_lengths else None, "seed": load.seed, "machine": describe_machine()}
    result |= {key: statistics.median(run[key] for run in runs) for key in ("service", "mean_tokens")} | {"orders": {}}
    for order in ORDERS:
        figures = {key: statistics.median(run["orders"][order][key] for run in runs) for key in runs[0]["orders"][order]}
        result["orders"][order] = figures | ({} if order == "fcfs" else compare_with_first_come(runs, order))
    return result


def compare_with_first_come(runs: Sequence[dict[str, Any]], order: str) -> dict[str, Any]:
    """Ratios of an order's figures over first come first served, measured and simulated."""
    ratios = {}
    for name, key in (("over_fcfs", "orders"), ("simulated_over_fcfs", "simulated")):
        shared = runs[0][key][order]
        ratios[name] = {figure: summarize([over(run[key][order][figure], run[key]["fcfs"][figure]) for run in runs]) for figure in shared}
    return ratios
