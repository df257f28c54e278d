"""The body of a request to what is asked: messages, an Ask, and what is to be told. Pure: no model, no socket.

Wrong types are refused by name, as is what this server cannot do; keys that it does not know are ignored, as OpenAI's are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sbtiny.errors import InputError
from sbtiny.models.prompt import Message
from sbtiny.serving.ask import ROLES, Ask, describe_budget
from sbtiny.serving.budget_dialects import WRAPPERS, BudgetWish, read_budget, require_object, shown
from sbtiny.serving.request_error import RequestError

ROLES_OF_REQUESTS = (*ROLES, "developer")  # OpenAI's newer name of the system's
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 256
ANY_SEED = -1  # as llama-server and vLLM take it
REFUSED: dict[str, Callable[[Any], bool]] = {  # what is not supported, and the values that ask for nothing
    "n": lambda value: value == 1,
    "best_of": lambda value: value == 1,
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0,
    "prompt_logprobs": lambda value: value == 0,
    "tools": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": lambda value: value == [],
    "response_format": lambda value: value == {"type": "text"},
    "logit_bias": lambda value: value == {},
    "presence_penalty": lambda value: value == 0,
    "frequency_penalty": lambda value: value == 0,
    "chat_template": lambda value: False,
    "suffix": lambda value: value == "",
    "echo": lambda value: value is False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """What a request asks for. `prompt` is the raw text of a completion; a chat has `messages`.

    `source` says which key the budget comes from ("server", "model"), `requested` is its value as it was sent. `seed` None: any.
    """

    ask: Ask
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    source: str = "model"
    requested: Any = None
    warnings: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    priority: int = 0
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    seeded: bool = False


def read_chat(body: dict[str, Any], defaults: Ask) -> ServeRequest:
    """Read the body of chat/completions. `defaults`: what holds where the request says nothing. Raises RequestError."""
    return replace(read_common(body, defaults), messages=tuple(read_messages(body.get("messages"))))


def read_completion(body: dict[str, Any], defaults: Ask) -> ServeRequest:
    """Read the body of completions: one raw text. Raises RequestError."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError("prompt must be one text that is not empty", "prompt")
    return replace(read_common(body, defaults), prompt=prompt)


def read_common(body: dict[str, Any], defaults: Ask) -> ServeRequest:
    check_supported(body)
    wish, warnings = read_budget(body)
    stream = read_bool(body, "stream")
    options = require_object(body["stream_options"], "stream_options") if body.get("stream_options") is not None else {}
    for name in ("user", "model"):
        if not isinstance(body.get(name, ""), str | None):
            raise RequestError(f"{name} must be a text", name)
    ask, more = read_ask(body, wish, defaults)
    return ServeRequest(
        ask=ask,
        source=wish.source if wish else "server" if ask.coverage is not None or ask.choice.mode != "auto" else "model",
        requested=wish.requested if wish else None if describe_budget(ask) == "auto" else describe_budget(ask),
        warnings=(*warnings, *more),
        stop=read_stop(body.get("stop")),
        priority=read_whole(body, "priority", -(2**31), 2**31) or 0,
        stream=stream,
        include_usage=read_bool(options, "include_usage", "stream_options."),
        continuous_usage=read_bool(options, "continuous_usage_stats", "stream_options."),
        seeded=read_seed(body) is not None,
    )


def check_supported(body: dict[str, Any]) -> None:
    """Raise RequestError for what this server cannot do, by name."""
    for name, asks_nothing in REFUSED.items():
        if body.get(name) is not None and not asks_nothing(body[name]):
            raise RequestError(f"{name} is not supported here: leave it out", name, "unsupported")
    for wrapper in WRAPPERS:
        if isinstance(body.get(wrapper), dict) and body[wrapper].get("chat_template") is not None:
            raise RequestError("chat_template is not supported here: leave it out", f"{wrapper}.chat_template", "unsupported")


def read_seed(body: dict[str, Any]) -> int | None:
    """The seed of a request; None where any will do."""
    seed = read_whole(body, "seed", -(2**63), 2**63)
    return None if seed == ANY_SEED else seed


def read_ask(body: dict[str, Any], wish: BudgetWish | None, defaults: Ask) -> tuple[Ask, list[str]]:
    """The Ask of a request, and warnings. Ceiling and the most tokens stay the server's."""
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    wanted = None if body.get(name) == -1 else read_whole(body, name, 1, 2**31)  # -1: llama.cpp's page for no limit
    temperature, top_p = read_number(body, "temperature", 0, 2), read_number(body, "top_p", 0, 1)
    given = {
        "max_tokens": None if wanted is None else min(wanted, defaults.max_tokens),
        "temperature": temperature if temperature is None or temperature >= 0.01 else 0.0,  # as good as greedy, and no overflow
        "top_p": None if top_p is None else max(top_p, 1e-6),
        "top_k": max(0, top_k) if (top_k := read_whole(body, "top_k", -1, 2**31)) is not None else None,
        "min_p": read_number(body, "min_p", 0, 1),
        "seed": read_seed(body),
    }
    if wish is not None:
        given |= {"choice": wish.choice}
    try:
        ask = replace(defaults, **{key: value for key, value in given.items() if value is not None})
        ask = ask if wish is None else replace(ask, coverage=wish.coverage)
    except InputError as error:
        raise RequestError(str(error)) from error
    capped = wanted is not None and wanted > defaults.max_tokens
    return ask, [f"{name} is {defaults.max_tokens} at most here"] if capped else []


def read_messages(value: Any) -> list[Message]:
    """Read the turns of a chat; their texts may be lists of text parts."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of turns that is not empty", "messages")
    messages = []
    for i, turn in enumerate(value):
        where = f"messages[{i}]"
        role, content = require_object(turn, where).get("role"), turn.get("content")
        if role not in ROLES_OF_REQUESTS:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES_OF_REQUESTS)}, not {shown(role)}", f"{where}.role")
        if content is None and role == "assistant":
            content = ""
        messages.append({"role": "system" if role == "developer" else role, "content": read_text(content, f"{where}.content")})
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RequestError("the last turn must be the user's, with a text", f"messages[{len(messages) - 1}]")
    return messages


def read_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text parts, not {shown(content)}", where)
    for i, part in enumerate(content):
        if require_object(part, f"{where}[{i}]").get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}] must be a part of type text, with a text: nothing else can be read here", f"{where}[{i}]")
    return "".join(part["text"] for part in content)


def read_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= MOST_STOP_CHARACTERS for s in stops):
        raise RequestError(f"stop must be a text or a list of texts of 1 to {MOST_STOP_CHARACTERS} characters", "stop")
    if len(stops) > MOST_STOPS:
        raise RequestError(f"stop has {len(stops)} texts: at most {MOST_STOPS}", "stop")
    return tuple(stops)


def read_bool(body: dict[str, Any], name: str, where: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{where}{name} must be true or false, not {shown(value)}", where + name)
    return bool(value)


def read_whole(body: dict[str, Any], name: str, least: int, below: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
        raise RequestError(f"{name} must be a whole number from {least} to {below - 1}, not {shown(value)}", name)
    return value


def read_number(body: dict[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError(f"{name} must be a number from {least} to {most}, not {shown(value)}", name)
    return float(value)
