"""The application: the server's routes, what stands before them, and how a refusal looks."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import StarletteHTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from sse_starlette.sse import AppStatus

from sbtiny import __version__
from sbtiny.budget.protocol import MAX_BUDGET
from sbtiny.errors import InputError
from sbtiny.serving.budget_dialects import EFFORTS, THINKING_TYPES
from sbtiny.serving.guard import Guard
from sbtiny.serving.request_error import RequestError, error_body
from sbtiny.serving.requests import MOST_STOP_CHARACTERS, MOST_STOPS, ROLES_OF_REQUESTS
from sbtiny.serving.server import MOST_EXTENSION, Server
from sbtiny.serving.worker import Worker

STOP = {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS}
TEXTS = {"oneOf": [STOP, {"type": "array", "items": STOP, "maxItems": MOST_STOPS}]}
ROLE = {"type": "string", "enum": list(ROLES_OF_REQUESTS)}
PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
CONTENT = {"oneOf": [{"type": "string"}, {"type": "array", "items": PART, "minItems": 1}]}
TURN = {"type": "object", "required": ["role", "content"], "properties": {"role": ROLE, "content": CONTENT}}
TOKENS = {"type": "integer", "minimum": -1, "maximum": MAX_BUDGET}
EXTENSION = {"type": "integer", "minimum": 1, "maximum": MOST_EXTENSION}
OWN_BUDGET = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": False,
    "properties": {
        "tokens": TOKENS,
        "seconds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e7},
        "coverage": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    },
}
OWN_TEXT = r"^(auto|[0-9]{1,6}|([1-9][0-9]{0,3}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9])[sx]|[1-9][0-9]?(\.[0-9]{1,3})?%)$"
EFFORT = {"type": "string", "enum": list(EFFORTS)}
ACTION = {"type": "string", "enum": ["reasoning_end", "stop", "extend"]}
COMMON = {
    "model": {"type": "string"},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}, "continuous_usage_stats": {"type": "boolean"}},
    },
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": TEXTS,
    "user": {"type": "string"},
    "priority": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    "budget": {"oneOf": [TOKENS, {"type": "string", "pattern": OWN_TEXT}, OWN_BUDGET]},
    "thinking_token_budget": TOKENS,
    "thinking_budget_tokens": TOKENS,
    "reasoning_budget_tokens": TOKENS,
    "thinking_budget": TOKENS,
    "thinking": {"type": "object", "properties": {"type": {"type": "string", "enum": list(THINKING_TYPES)}, "budget_tokens": TOKENS}},
    "reasoning": {"type": "object", "properties": {"effort": EFFORT, "max_tokens": TOKENS}},
    "reasoning_effort": EFFORT,
}


def describe_body(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request's body in OpenAPI."""
    schema = {"type": "object", "required": list(required), "properties": required | more}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def show_error(request: Request, error: Exception) -> Response:
    """Every refusal in OpenAI's shape."""
    if isinstance(error, StarletteHTTPException):
        return JSONResponse(error_body(f"{request.method} here: {error.detail}", error.status_code), error.status_code, error.headers)
    if isinstance(error, RequestError):
        headers = {"Retry-After": str(error.retry)} if error.status in (429, 503) else None
        return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, headers)
    if isinstance(error, InputError):
        return JSONResponse(error_body(str(error)), 400)
    return JSONResponse(error_body("the server has failed at this request", 500), 500)


def create_app(worker: Worker, name: str, api_key: str | None = None, cors: Sequence[str] = (), is_local: bool = True) -> FastAPI:
    """Make the application. It starts the worker and stops it; `is_local`: it is bound to this machine alone."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.loop = asyncio.get_running_loop()
        worker.start()
        yield
        worker.stop()
        if worker.state != "loading":  # a model that loads reads no inbox, and its thread ends with the process
            await asyncio.to_thread(worker.thread.join, 30)

    AppStatus.disable_automatic_graceful_drain()  # at SIGTERM what runs is finished; every stream of ours ends by itself
    server = Server(worker, name)
    app = FastAPI(title="sbtiny", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for path, route, more in (
        ("/v1/chat/completions", server.chat, describe_body({"messages": {"type": "array", "items": TURN, "minItems": 1}}, **COMMON)),
        ("/v1/chat/completions/control", server.control, describe_body({"id": {"type": "string"}, "action": ACTION}, tokens=EXTENSION)),
        ("/v1/completions", server.complete, describe_body({"prompt": {"type": "string", "minLength": 1}}, **COMMON)),
    ):
        app.add_api_route(path, route, methods=["POST"], response_model=None, openapi_extra=more)
    for path, route in (
        ("/v1/models", server.models),
        ("/health", server.health),
        ("/slots", server.slots),
        ("/metrics", server.show_metrics),
        ("/", server.page),
    ):
        app.add_api_route(path, route, methods=["GET"], response_model=None)
    for kind in (StarletteHTTPException, InputError, Exception):
        app.add_exception_handler(kind, show_error)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(Guard, api_key=api_key, cors=tuple(cors), is_local=is_local)
    return app
