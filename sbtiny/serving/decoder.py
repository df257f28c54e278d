"""The synchronous heart of the server: requests enter the assistant, it decodes a step, and what is new is told. Knows no thread."""

import logging
import time
from dataclasses import replace
from typing import Any

from sbtiny.budget.calibration import COVERAGES
from sbtiny.budget.online_calibration import OnlineCalibration
from sbtiny.budget.protocol import BudgetChoice
from sbtiny.errors import InputError, UpstreamError
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HeadsFirst
from sbtiny.serving.job import Job, Update
from sbtiny.serving.queue import QueueFull
from sbtiny.serving.reply import Reply
from sbtiny.serving.request_error import RequestError

TICK = 1.0  # seconds between two updates of a count-down
# Text of one answer is sent every 30 ms at most, and of all answers in 250 events a second: an event costs as much as many tokens of a
# small model, and its thread waits for the same interpreter.
FLUSH_SECONDS, EVENT_SECONDS = 0.03, 0.004
log = logging.getLogger(__name__)


class Decoder:
    """Decodes jobs with an assistant. `news` are the updates that nobody has taken yet.

    At most `most_waiting` bodies wait. `seconds`: an answer that takes longer in its slot is wrapped up; 0 is off.
    """

    def __init__(self, assistant: Assistant, most_waiting: int, seconds: float = 0.0) -> None:
        self.assistant, self.seconds = assistant, seconds
        engine, head_tokens = assistant.policy.engine, assistant.limiter.head_tokens
        self.bodies = HeadsFirst(assistant.session, engine.rows, engine.slot_bytes(1024) // 1024, most_waiting, head_tokens)
        self.slots = self.bodies.slots
        if assistant.calibration is not None:
            assistant.online = OnlineCalibration(assistant.calibration, (*COVERAGES, assistant.settings.coverage))
        self.promises: dict[float, tuple[float, float | None]] = {}  # by coverage: level and kept share; replaced whole, for any thread
        self.jobs: list[Job] = []  # in the order of their arrival
        self.news: list[tuple[Job, Update]] = []
        self.count = 0
        self.ticked = 0.0

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot; may be read from any thread."""
        return len(self.bodies.queue)

    def turn(self) -> None:
        """Decode one token of each answer and tell what is new."""
        started = time.perf_counter()
        self.assistant.step_each()
        self.bodies.after_step(time.perf_counter())
        self._publish(started)

    def take_news(self) -> list[tuple[Job, Update]]:
        news, self.news = self.news, []
        return news

    def begin(self, job: Job) -> None:
        """Let a request into the assistant: its head is decoded at once, its body when it is its turn. The only place where one enters."""
        if not job.is_open:
            return
        request = job.request
        self.count += 1
        ask = request.ask if request.seeded else replace(request.ask, seed=request.ask.seed + self.count)
        try:
            if request.prompt is None:
                job.reply = self.assistant.begin(request.messages, ask)
            else:
                job.reply = self.assistant.begin_text(request.prompt, ask)
            self.bodies.check_room(len(job.reply.prompt))
        except QueueFull as full:
            self.assistant.drop(job.reply)  # nothing was decoded of it
            self.news.append(
                (job, Update(error=RequestError(f"{full}: try again later", code="queue_full", status=429, retry=full.retry_after)))
            )
        except InputError as error:
            self.news.append((job, Update(error=to_request_error(error))))
        except Exception as error:  # a template or a tokenizer that fails on one request must not end the others
            log.error("a request could not begin: %s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
            self.news.append((job, Update(error=RequestError("this request cannot be read by the model", status=500))))
        else:
            job.most_seconds = self._most_seconds(job.request.ask.choice)
            self.bodies.add(job.reply, request.priority)
            self.jobs.append(job)
            self.news.append((job, Update()))

    def drop(self, job: Job) -> None:
        if job in self.jobs:
            self.assistant.drop(job.reply)
            self.bodies.drop(job.reply)
            self.jobs.remove(job)

    def describe_slots(self) -> list[dict[str, Any]]:
        """What is decoded and what waits, in the order of arrival; in the worker's thread."""
        context = self.assistant.context
        return [
            {"id": i, "id_task": job.id, "n_ctx": context, "is_processing": not job.position, "budget": job.budget_object()}
            for i, job in enumerate(self.jobs)
        ]

    def _publish(self, started: float) -> None:
        """Tell what is new after a step that began at `started`."""
        now = time.perf_counter()
        tick = now - self.ticked >= TICK
        filed = [job for job in self.jobs if job.filed is None and job.reply in self.bodies.queue]
        for job in filed:
            job.filed = now
        if tick or filed:
            self._foresee_waits(now)
        self.ticked = now if tick else self.ticked
        interval = max(FLUSH_SECONDS, EVENT_SECONDS * min(len(self.jobs), self.slots))
        for job in self.jobs:
            if job.admitted is None:
                self._follow_queue(job, started)
            elif job.most_seconds is not None:
                self._enforce_time(job, now)
            if tick or job.has_news(now, interval):
                self._tell(job, now, tick, interval)
            self._learn(job.reply)
        self.jobs = [job for job in self.jobs if not job.reply.is_done]

    def _follow_queue(self, job: Job, started: float) -> None:
        """Note when its body got its slot."""
        if job.reply in self.bodies.bodies or job.reply.is_done:
            job.admitted, job.position, job.wait = started, 0, None

    def _tell(self, job: Job, now: float, tick: bool, interval: float) -> None:
        """Tell the text, and the budget when it stands, when a cut comes, when its place changes, about once a second and at the end."""
        reply = job.reply
        if reply.refusal is not None:
            self.news.append((job, Update(error=to_request_error(reply.refusal))))
            return
        parts = job.take_parts(now, interval)
        if job.stops.is_hit and not reply.is_done:
            reply.interrupt.stop()
        stands = not job.has_begun and ((reply.budget is not None and job.has_place) or bool(parts) or reply.is_done)
        due = stands or tick or reply.is_done or job.told != (job.is_forced, job.position)
        if not parts and not due:
            return
        job.has_begun, job.told = job.has_begun or stands, (job.is_forced, job.position)
        tokens = reply.answer.tokens if reply.answer else len(reply.body.written) if reply.body else 0
        self.news.append(
            (
                job,
                Update(
                    parts=parts,
                    budget=job.budget_object() if due and job.has_begun else None,
                    position=job.position,
                    eta=job.wait.seconds if job.wait else None,
                    prompt_tokens=len(reply.prompt),
                    tokens=tokens,
                    thought_tokens=reply.thought_tokens,
                    outcome=job.outcome() if reply.is_done else None,
                ),
            )
        )

    def _learn(self, reply: Reply) -> None:
        """Let the online calibration see whether the promise of a finished answer was kept: `Reply.to_calibration` says which count.

        One that may take its promise and no more ends there, so it tells about its own coverage alone.
        """
        online, told = self.assistant.online, reply.to_calibration()
        if online is None or reply.calibration is not online or told is None:
            return
        if reply.source == "coverage":
            online.adapt(reply.coverage, told.used is not None)
        else:
            online.observe(told, {reply.coverage: reply.promise})
        self.promises = online.figures()

    def _enforce_time(self, job: Job, now: float) -> None:
        """Ask for the answer now where its seconds are over."""
        if not job.is_late and now - job.admitted > job.most_seconds:
            job.is_late = not job.is_forced and not job.reply.interrupt.presses and not job.reply.is_done
            if job.is_late:
                job.reply.press()

    def _most_seconds(self, choice: BudgetChoice) -> float | None:
        """The seconds in its slot after which an answer is wrapped up: the user's with their tolerance, or the server's."""
        given = choice.value * (1 + self.assistant.settings.given_tolerance) if choice.mode == "seconds" else 0.0
        return min((seconds for seconds in (given, self.seconds) if seconds), default=None)

    def _foresee_waits(self, now: float) -> None:
        """Give each request its position in the queue and the seconds until its turn."""
        waits = self.bodies.foresee(self.assistant.rate.per_second(now), now)
        for job in self.jobs:
            job.position, job.wait = waits.get(job.reply, (0, None))


def to_request_error(error: InputError) -> RequestError:
    """A 502 where an upstream has failed, else a 400; a refusal for the wire stays as it is."""
    if isinstance(error, RequestError):
        return error
    return RequestError(str(error), **({"code": "upstream_failed", "status": 502} if isinstance(error, UpstreamError) else {}))
