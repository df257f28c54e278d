"""The thread that owns the assistant. Requests come in by an inbox and go out as updates; no lock is held while it decodes."""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

from sbtiny.errors import InputError
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.decoder import Decoder
from sbtiny.serving.job import Job, Update
from sbtiny.serving.request_error import RequestError

REFUSALS = {
    "loading": "the model is being loaded: try again soon",
    "failed": "the decoder has crashed: restart the server",
    "stopped": "the server is stopping",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Errand:
    """Work for the worker's thread, and what is told where it can no longer be done."""

    run: Callable[[], None]
    refuse: Callable[[RequestError], None]


def make_refusal(state: str) -> RequestError:
    return RequestError(REFUSALS[state], code=state, status=503)


class Worker:
    """Loads the assistant, then decodes what is submitted.

    `submit`, `cancel` and `call` belong to the thread of `loop`, set before `start`. At most `most_waiting` requests wait beside those
    that are decoded. `seconds`: an answer that takes longer is wrapped up; 0 is off. `on_ready` is called once it is loaded or has failed.
    """

    def __init__(self, load: Callable[[], Assistant], most_waiting: int, seconds: float = 0.0, on_ready: Callable[[], None] = lambda: None):
        self.thread = threading.Thread(target=self._run, name="sbtiny-worker", daemon=True)
        self.load, self.most_waiting, self.seconds, self.on_ready = load, most_waiting, seconds, on_ready
        self.state: Literal["loading", "ready", "failed", "stopped"] = "loading"
        self.error: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.decoder: Decoder | None = None
        self.inbox: SimpleQueue[Errand] = SimpleQueue()
        self.accepted = 0

    # ---- called by the loop's thread -----------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Accept a request. Raises RequestError: 503 while nothing can be decoded, 429 where too many wait."""
        self.check_ready()
        if self.accepted >= self.decoder.slots + self.most_waiting:
            retry = self.decoder.bodies.queue.seconds_until_room(1)
            raise RequestError(f"{self.most_waiting} requests wait already: try again later", code="queue_full", status=429, retry=retry)
        self.accepted += 1
        self._send(Errand(lambda: self.decoder.begin(job), lambda error: self._deliver([(job, Update(error=error))])))

    def cancel(self, job: Job) -> None:
        """Forget a request; one that has ended is ignored. Its slot is free for the next step."""
        if job.is_open:
            self._close(job)
            self._send(Errand(lambda: self.decoder.drop(job), lambda error: None))

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

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its present step."""
        self.inbox.put(Errand(lambda: self._fail("stopped"), lambda error: None))

    def check_ready(self) -> None:
        if (state := self.state) != "ready":  # read once: the thread may be ready at any moment
            raise make_refusal(state)

    def _send(self, errand: Errand) -> None:
        self.inbox.put(errand)
        if self.state in ("failed", "stopped"):  # nobody reads the inbox any more
            self._refuse_inbox(make_refusal(self.state))

    def _close(self, job: Job) -> None:
        self.accepted -= job.is_open
        job.is_open = False

    def _deliver(self, news: list[tuple[Job, Update]]) -> None:
        for job, update in news:
            if update.is_last:
                self._close(job)
            job.updates.put_nowait(update)
            if not job.begun.done():
                job.begun.set_result(update)

    # ---- the worker's thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.decoder = Decoder(self.load(), self.most_waiting, self.seconds)
            gc.collect()
            gc.freeze()  # what is loaded stays: to look through it takes 0.2 s, in which nobody gets a token
            self.state = "ready"
            self.on_ready()
            while self.state == "ready":
                self._read_inbox()
                if self.decoder.jobs:
                    self.decoder.turn()
                if news := self.decoder.take_news():
                    self._to_loop(self._deliver, news)
        except Exception as error:  # whatever it is, every reader must be told
            self.error = error
            if self.decoder is not None:
                log.error("the decoder has crashed: %s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
            self._fail("failed")
            if self.decoder is None:
                self.on_ready()

    def _read_inbox(self) -> None:
        """Run the errands that have come; wait for one where nothing is decoded."""
        try:
            self.inbox.get(block=not self.decoder.jobs).run()
            while self.state == "ready":
                self.inbox.get_nowait().run()
        except Empty:
            return

    def _to_loop(self, work: Callable[[Any], None], value: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(work, value)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.state = "stopped"

    def _fail(self, state: Literal["failed", "stopped"]) -> None:
        self.state = state
        error = make_refusal(state)
        if self.decoder is not None:
            told = self.decoder.take_news()
            ended = {job for job, update in told if update.is_last}
            jobs, self.decoder.jobs = self.decoder.jobs, []
            self._to_loop(self._deliver, told + [(job, Update(error=error)) for job in jobs if job not in ended])
        self._to_loop(self._refuse_inbox, error)

    def _refuse_inbox(self, error: RequestError) -> None:
        """Refuse what nobody will do any more; in the loop's thread."""
        while not self.inbox.empty():
            try:
                self.inbox.get_nowait().refuse(error)
            except Empty:
                return
