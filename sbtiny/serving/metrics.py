"""Figures for Prometheus: requests, tokens, the queue, time to the first token, budgets kept."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sbtiny.serving.job import JobOutcome, Update
from sbtiny.serving.request_error import CLIENT_GONE
from sbtiny.serving.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Of one server. Written by the loop's thread."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("sbtiny_requests", "Requests by how they ended", ["outcome"], registry=self.registry)
        self.tokens = Counter("sbtiny_tokens", "Tokens of finished answers", ["kind"], registry=self.registry)
        self.budgets = Counter(
            "sbtiny_budgets", "Answers with a budget that tell: within it, or its promise, or not", ["kept"], registry=self.registry
        )
        self.first = Histogram("sbtiny_time_to_first_token_seconds", "From acceptance", buckets=SECONDS, registry=self.registry)
        self.queued = Histogram("sbtiny_queue_time_seconds", "That a body waited for a slot", buckets=SECONDS, registry=self.registry)
        self.worker = worker
        self.kept_share = Gauge(
            "sbtiny_promise_kept_share", "Of the last promises that an answer tells about", ["coverage"], registry=self.registry
        )
        self.level = Gauge("sbtiny_promise_level", "Share of scores that promises are made at now", ["coverage"], registry=self.registry)
        for name, about, read in (
            ("sbtiny_queue_length", "Requests that wait for a slot", lambda: worker.decoder.waiting if worker.decoder else 0),
            ("sbtiny_requests_open", "Requests that wait or are decoded", lambda: worker.accepted),
            ("sbtiny_slots", "Answers decoded at once, at most", lambda: worker.decoder.slots if worker.decoder else 0),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)

    def record(self, update: Update) -> None:
        """Count the last update of a request."""
        if update.outcome is None:
            self.requests.labels("queue_full" if update.error.status == 429 else "error").inc()
            return
        outcome: JobOutcome = update.outcome
        answer = outcome.answer
        self.requests.labels(outcome.stop_reason).inc()
        self.tokens.labels("prompt").inc(outcome.prompt_tokens)
        self.tokens.labels("completion").inc(answer.tokens)
        self.first.observe(outcome.first)
        self.queued.observe(outcome.queued)
        budget = answer.promise or answer.given or answer.stated
        # One that was stopped within its budget tells nothing: it might have gone on.
        if budget is not None and (answer.stop_reason == "end" or answer.used > budget):
            self.budgets.labels("yes" if answer.used <= budget else "no").inc()

    def record_refusal(self, status: int) -> None:
        self.requests.labels({429: "queue_full", CLIENT_GONE: "client_gone"}.get(status, "refused")).inc()

    def record_gone(self) -> None:
        self.requests.labels("client_gone").inc()

    def render(self) -> bytes:
        for coverage, (level, kept) in self.worker.decoder.promises.items() if self.worker.decoder else ():
            self.level.labels(coverage).set(level)
            if kept is not None:
                self.kept_share.labels(coverage).set(kept)
        return generate_latest(self.registry)
