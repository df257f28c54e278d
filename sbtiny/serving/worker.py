"""The thread that owns the assistant. Requests come in by an inbox and go out as updates; no lock is held while it decodes."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal

from sbtiny.errors import InputError
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.job import Job, Update
from sbtiny.serving.request_error import RequestError

TICK = 1.0  # seconds between two updates of a count-down
CRASHED = "the decoder has crashed: restart the server"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Errand:
    """Work for the worker's thread, and what is told where it can no longer be done."""

    run: Callable[[], None]
    refuse: Callable[[RequestError], None]


class Worker(threading.Thread):
    """Loads the assistant, then decodes what is submitted.

    `submit`, `cancel` and `call` belong to the thread of `loop`, set before `start`. At most `most_waiting` requests wait beside those
    that are decoded. `seconds`: an answer that takes longer is wrapped up; 0 is off. `on_ready` is called once it is loaded or has failed.
    """

    def __init__(self, load: Callable[[], Assistant], most_waiting: int, seconds: float = 0.0, on_ready: Callable[[], None] = lambda: None):
        super().__init__(name="sbtiny-worker", daemon=True)
        self.load, self.most_waiting, self.seconds, self.on_ready = load, most_waiting, seconds, on_ready
        self.state: Literal["loading", "ready", "failed", "stopped"] = "loading"
        self.error: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.assistant: Assistant | None = None
        self.inbox: SimpleQueue[Errand] = SimpleQueue()
        self.outbox: list[tuple[Job, Update]] = []
        self.jobs: list[Job] = []  # in the order of their arrival
        self.accepted = self.count = self.slots = self.waiting = 0
        self.ticked, self.mean_tokens = 0.0, 0.0

    # ---- called by the loop's thread -----------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Accept a request. Raises RequestError: 503 while nothing can be decoded, 429 where too many wait."""
        self.check_ready()
        if self.accepted >= self.slots + self.most_waiting:
            raise RequestError(f"{self.most_waiting} requests wait already: try again later", code="queue_full", status=429)
        self.accepted += 1
        self._send(Errand(lambda: self._begin(job), lambda error: self._deliver([(job, Update(error=error))])))

    def cancel(self, job: Job) -> None:
        """Forget a request; one that has ended is ignored. Its slot is free for the next step."""
        if job.is_open:
            self._close(job)
            self._send(Errand(lambda: self._drop(job), lambda error: None))

    def call(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Do something between two steps, in the worker's thread. The future has its result, or the InputError that it raised."""
        self.check_ready()
        future = self.loop.create_future()

        def settle(value: Any) -> None:
            if not future.done():
                (future.set_exception if isinstance(value, Exception) else future.set_result)(value)

        def run() -> None:
            try:
                value = work()
            except InputError as error:
                value = error
            self._to_loop(settle, value)

        self._send(Errand(run, settle))
        return future

    def describe_slots(self) -> list[dict[str, Any]]:
        """What is decoded and what waits, in the order of arrival; in the worker's thread."""
        context = self.assistant.context
        return [
            {"id": i, "id_task": job.id, "n_ctx": context, "is_processing": not job.position, "budget": job.budget_object()}
            for i, job in enumerate(self.jobs)
        ]

    def stop(self) -> None:
        """End the thread after its present step."""
        self.inbox.put(Errand(self._stop, lambda error: None))

    def check_ready(self) -> None:
        if self.state != "ready":
            what = {"loading": "the model is being loaded: try again soon", "failed": CRASHED, "stopped": "the server is stopping"}
            raise RequestError(what[self.state], code=self.state, status=503)

    def _send(self, errand: Errand) -> None:
        self.inbox.put(errand)
        if self.state in ("failed", "stopped"):  # nobody reads the inbox any more
            self._refuse_inbox(RequestError(CRASHED, code=self.state, status=503))

    def _close(self, job: Job) -> None:
        self.accepted -= job.is_open
        job.is_open = False

    def _deliver(self, news: list[tuple[Job, Update]]) -> None:
        for job, update in news:
            if update.is_last:
                self._close(job)
            job.updates.put_nowait(update)

    # ---- the worker's thread -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self.assistant = self.load()
            engine = self.assistant.policy.engine
            self.slots = getattr(engine, "rows", 0) or self.assistant.settings.max_num_seqs
            self.state = "ready"
            self.on_ready()
            while self.state == "ready":
                self._turn()
        except Exception as error:  # whatever it is, every reader must be told
            self.error = error
            if self.assistant is not None:
                log.exception("the decoder has crashed")
            self._fail("failed")
            if self.assistant is None:
                self.on_ready()

    def _turn(self) -> None:
        """Take what has come, decode one token of each answer, tell what is new."""
        begun = self._read_inbox()
        if self.jobs:
            started = time.perf_counter()
            self.assistant.step_each()
            self._publish(started, begun)
        if self.outbox:
            self._to_loop(self._deliver, self.outbox)
            self.outbox = []

    def _read_inbox(self) -> bool:
        """Run the errands that have come; wait for one where nothing is decoded. Returns whether a request began."""
        before = len(self.jobs)
        try:
            errand = self.inbox.get(block=not self.jobs)
            while True:
                errand.run()
                errand = self.inbox.get_nowait()
        except Empty:
            return len(self.jobs) > before

    def _begin(self, job: Job) -> None:
        """Let a request into the assistant, first come first served. The only place where one enters."""
        if not job.is_open:
            return
        request = job.request
        self.count += 1
        ask = request.ask if request.seeded else replace(request.ask, seed=request.ask.seed + self.count)
        try:
            begin = self.assistant.begin_text if request.prompt is not None else self.assistant.begin
            job.reply = begin(request.prompt if request.prompt is not None else list(request.messages), ask)
        except InputError as error:
            self.outbox.append((job, Update(error=RequestError(str(error)))))
        except Exception:  # a template or a tokenizer that fails on one request must not end the others
            log.exception("a request could not begin")
            self.outbox.append((job, Update(error=RequestError("this request cannot be read by the model", status=500))))
        else:
            self.jobs.append(job)
            self.outbox.append((job, Update()))

    def _drop(self, job: Job) -> None:
        if job in self.jobs:
            self.assistant.drop(job.reply)
            self.jobs.remove(job)

    def _publish(self, started: float, begun: bool) -> None:
        """Tell what is new after a step that began at `started`."""
        now = time.perf_counter()
        tick = now - self.ticked >= TICK
        if tick or begun:
            self._estimate_waits()
        self.ticked = now if tick else self.ticked
        for job in self.jobs:
            if job.admitted is None and not job.is_waiting:
                job.admitted = started
            if not job.is_waiting:
                job.position = 0
            self._enforce_time(job, now)
            self._tell(job, now, tick)
        ended = [job for job in self.jobs if job.reply.is_done]
        self.jobs = [job for job in self.jobs if not job.reply.is_done]
        for job in ended:
            if job.reply.answer:
                self.mean_tokens += (job.reply.answer.tokens - self.mean_tokens) * (0.1 if self.mean_tokens else 1.0)
        self.waiting = sum(job.position > 0 for job in self.jobs)

    def _tell(self, job: Job, now: float, tick: bool) -> None:
        """Tell the text, and the budget when it stands, when a cut comes, when its place changes, about once a second and at the end."""
        reply = job.reply
        if reply.refusal is not None:
            self.outbox.append((job, Update(error=RequestError(str(reply.refusal)))))
            return
        parts = job.take_parts(now)
        if job.stops.is_hit and not reply.is_done:
            reply.interrupt.stop()
        stands = not job.has_begun and (reply.budget is not None or bool(parts) or reply.is_done)
        due = stands or tick or reply.is_done or job.told != (job.is_forced, job.position)
        if not parts and not due:
            return
        job.has_begun, job.told = job.has_begun or stands, (job.is_forced, job.position)
        tokens = reply.answer.tokens if reply.answer else len(reply.body.written) if reply.body else 0
        self.outbox.append(
            (
                job,
                Update(
                    parts=parts,
                    budget=job.budget_object() if due and job.has_begun else None,
                    position=job.position,
                    eta=job.wait,
                    prompt_tokens=len(reply.prompt),
                    tokens=tokens,
                    thought_tokens=reply.thought_tokens,
                    outcome=job.outcome() if reply.is_done else None,
                ),
            )
        )

    def _enforce_time(self, job: Job, now: float) -> None:
        """Ask for the answer now where its seconds are over."""
        choice, tolerance = job.request.ask.choice, self.assistant.settings.given_tolerance
        given = choice.value * (1 + tolerance) if choice.mode == "seconds" else 0.0
        most = min((s for s in (given, self.seconds) if s), default=None)
        if most is not None and job.reply.first_at is not None and not job.is_late and now - job.reply.first_at > most:
            job.is_late = not job.is_forced and not job.reply.interrupt.presses and not job.reply.is_done
            if job.is_late:
                job.reply.press()

    def _estimate_waits(self) -> None:
        """Give each waiting request its position and the seconds until its turn, from what is left of those before it."""
        rate, ahead, position = self.assistant.rate.per_second(time.perf_counter()), 0.0, 0
        for job in self.jobs:
            if job.is_waiting:
                position += 1
                full = len(self.jobs) > self.slots
                job.position, job.wait = position if full else 0, ahead / (rate * self.slots) if rate and full else None
                ahead += job.reply.budget or self.mean_tokens
            else:
                left = job.reply.progress().left
                ahead += self.mean_tokens if left is None else left

    def _to_loop(self, work: Callable[[Any], None], value: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(work, value)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.state = "stopped"

    def _stop(self) -> None:
        self._fail("stopped")

    def _fail(self, state: Literal["failed", "stopped"]) -> None:
        self.state = state
        error = RequestError(CRASHED if state == "failed" else "the server was stopped", code=state, status=503)
        jobs, self.jobs, self.outbox = self.jobs, [], []
        self._to_loop(self._deliver, [(job, Update(error=error)) for job in jobs])
        self._to_loop(self._refuse_inbox, error)

    def _refuse_inbox(self, error: RequestError) -> None:
        """Refuse what nobody will do any more; in the loop's thread."""
        while not self.inbox.empty():
            try:
                self.inbox.get_nowait().refuse(error)
            except Empty:
                return
