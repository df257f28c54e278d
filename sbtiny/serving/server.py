"""The OpenAI-compatible server: routes, and the way from a request to an answer. The sockets are asyncio's, the decoding a Worker's."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from sse_starlette import EventSourceResponse

from sbtiny.budget.stream import Part
from sbtiny.serving.answers import DONE, AnswerWriter, encode_event, encode_queued
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.guard import read_bounded
from sbtiny.serving.job import Job, Update
from sbtiny.serving.metrics import Metrics
from sbtiny.serving.page import PAGE, POLICY
from sbtiny.serving.request_body import parse_body
from sbtiny.serving.request_error import CLIENT_GONE, RequestError, error_body
from sbtiny.serving.requests import ServeRequest, read_chat, read_completion
from sbtiny.serving.worker import Worker

PING_SECONDS = 5  # proxies close what is silent for a minute
HEADER_SECONDS = 1.0  # a request is read so long before its stream begins: what is refused until then has a status of its own
MOST_EXTENSION = 1_000_000  # tokens
MOST_CHARACTERS = 64  # of a token: a longer text is refused before it is tokenised, which would hold up the others


class Server:
    """The routes of one worker. `name` is what clients call the model."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker, self.name, self.metrics = worker, name, Metrics(worker)
        self.jobs: dict[str, Job] = {}

    # ---- answers -------------------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def _answer(self, request: Request, read: Any) -> Response:
        try:
            body = parse_body(await read_bounded(request))
            self.worker.check_ready()
            asked = check_for(self.worker.decoder.assistant, read(body, self.worker.decoder.assistant.defaults))
            job = Job(asked)
            self.worker.submit(job)
        except RequestError as error:
            self.metrics.record_refusal(error.status)
            raise
        self.jobs[job.id] = job
        if not asked.stream:
            try:
                return await self._whole(request, job)
            finally:
                self.release(job)
        try:
            begun, _ = await asyncio.wait({job.begun}, timeout=HEADER_SECONDS)
        except BaseException:
            self.release(job)
            raise
        if begun and (first := job.begun.result()).error is not None:
            self.release(job)
            self.metrics.record(first)
            raise first.error
        return JobStream(self, job)

    async def _whole(self, request: Request, job: Job) -> Response:
        """Wait for the whole answer, or for the client to go."""
        gone = asyncio.ensure_future(wait_until_gone(request))
        reading = asyncio.ensure_future(read_to_end(job))
        try:
            await asyncio.wait({gone, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                self.metrics.record_gone()
                return Response(status_code=CLIENT_GONE)
            parts, last = reading.result()
        finally:
            gone.cancel()
            reading.cancel()
        self.metrics.record(last)
        if last.error is not None:
            raise last.error
        return JSONResponse(AnswerWriter(job, self.name).whole(parts, last), headers={"X-Request-Id": job.id})

    async def stream(self, job: Job) -> AsyncIterator[bytes]:
        """The events of an answer: all that has come since the last were sent, in one piece."""
        writer, is_over = AnswerWriter(job, self.name), False
        while not is_over:
            updates = [await job.updates.get()]
            while not job.updates.empty():
                updates.append(job.updates.get_nowait())
            events = []
            for update in updates:
                if update.error is not None:
                    error = update.error
                    events.append(encode_event(error_body(str(error), error.status, error.param, error.code)))
                events += [encode_event(chunk) for chunk in writer.chunks(update)]
                if update.position:
                    events.append(encode_queued(update))
                if is_over := update.is_last:
                    self.metrics.record(update)
                    events.append(DONE)
            yield b"".join(events)

    def record_unread(self, job: Job) -> None:
        """Count an answer whose reader has gone: by its end where it has one, which the reader may not have taken."""
        if job.is_open:
            self.metrics.record_gone()
        while not job.updates.empty():
            if (update := job.updates.get_nowait()).is_last:
                self.metrics.record(update)

    def release(self, job: Job) -> None:
        """Forget a job; where it has not ended, its slot is freed."""
        self.jobs.pop(job.id, None)
        self.worker.cancel(job)

    async def control(self, request: Request) -> Response:
        """Answer now, stop, or extend a running answer."""
        body = parse_body(await read_bounded(request))
        job, action, tokens = self.jobs.get(str(body.get("id"))), body.get("action"), body.get("tokens")
        if action not in ("reasoning_end", "stop", "extend"):
            raise RequestError("action must be reasoning_end, stop or extend", "action")
        if action == "extend" and (isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 < tokens <= MOST_EXTENSION):
            raise RequestError(f"tokens must be a whole number from 1 to {MOST_EXTENSION}", "tokens")
        if not isinstance(body.get("id"), str) or job is None or not job.is_open:
            raise RequestError("no answer of this id is being written", "id", "not_found", 404)
        await self.worker.call(lambda: self._act(job, action, tokens))
        return JSONResponse({"id": job.id, "action": action, "success": True})

    def _act(self, job: Job, action: str, tokens: int | None) -> None:
        """Do an action, in the worker's thread."""
        if job.reply is None or job.reply.is_done:
            raise RequestError("no answer of this id is being written", "id", "not_found", 404)
        if action == "extend":
            self.worker.decoder.assistant.extend(job.reply, tokens)
        elif action == "stop":
            job.reply.interrupt.stop()
        elif not job.reply.interrupt.presses and not job.reply.is_answering:  # asked for twice, or in its answer, it is no stop
            job.reply.press()

    # ---- the server itself ---------------------------------------------------------------------------------------------------------

    async def models(self) -> Response:
        self.worker.check_ready()
        assistant = self.worker.decoder.assistant
        about = {
            "max_model_len": assistant.context,
            "states_budget": assistant.policy.states_budget,
            "calibrated": assistant.fitting_calibration(assistant.defaults) is not None,
        }
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "created": 0, "owned_by": "sbtiny"} | about]})

    async def health(self) -> Response:
        states = {"ready": (200, "ok"), "loading": (503, "loading model"), "failed": (503, "error"), "stopped": (503, "stopping")}
        status, word = states[self.worker.state]
        return JSONResponse({"status": word}, status)

    async def slots(self) -> Response:
        """What is decoded and what waits, without its texts."""
        return JSONResponse(await self.worker.call(lambda: self.worker.decoder.describe_slots()))

    async def show_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})


class JobStream(EventSourceResponse):
    """The stream of a job. However it ends, also before its first event, the job is released."""

    def __init__(self, server: Server, job: Job) -> None:
        super().__init__(server.stream(job), ping=PING_SECONDS, sep="\n", headers={"X-Request-Id": job.id})
        self.server, self.job = server, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.server.record_unread(self.job)
            self.server.release(self.job)


def check_for(assistant: Assistant, asked: ServeRequest) -> ServeRequest:
    """The request with the warnings of this model. Raises RequestError for a text that cannot fit."""
    characters = len(asked.prompt or "") + sum(len(message["content"]) for message in asked.messages)
    if characters > MOST_CHARACTERS * assistant.context:
        raise RequestError(
            f"{characters} characters do not fit into a context of {assistant.context} tokens", code="context_length_exceeded"
        )
    if asked.ask.choice.mode == "scaled" and not assistant.policy.states_budget:
        return replace(asked, warnings=(*asked.warnings, f"this model states no budget that {asked.source} could scale: it had no effect"))
    return asked


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_to_end(job: Job) -> tuple[list[Part], Update]:
    parts: list[Part] = []
    while True:
        update = await job.updates.get()
        parts += update.parts
        if update.is_last:
            return parts, update
