"""What a user's budget is called: every dialect read to one thing. Pure.

The first key of KEYS that is there wins, and which one won is echoed. They are also honoured inside the WRAPPERS, with a warning, because
people put them there and silence is worse.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sbtiny.budget.protocol import MAX_BUDGET, SERVED_FORMS, BudgetChoice
from sbtiny.errors import InputError
from sbtiny.serving.ask import AUTO, Ask, choose_budget
from sbtiny.serving.request_error import RequestError

KEYS = (
    "budget",
    "thinking_token_budget",  # vLLM
    "thinking_budget_tokens",  # llama.cpp
    "reasoning_budget_tokens",
    "thinking_budget",  # Qwen
    "thinking.budget_tokens",  # Anthropic
    "reasoning.max_tokens",  # OpenRouter
    "reasoning_effort",
    "reasoning.effort",
)
EFFORTS = {"none": 0.0, "minimal": 0.25, "low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 4.0}  # factors on the model's own budget
WRAPPERS = ("chat_template_kwargs", "extra_body", "custom_params")
NESTED = ("thinking", "reasoning")
SWITCHES = ("enable_thinking", "reasoning.enabled")  # false turns thoughts off elsewhere
THINKING_TYPES = ("enabled", "disabled", "adaptive")
LOOKS_LIKE_A_BUDGET = re.compile(
    r"budget|(think|reason)\w*(token|effort|limit|max|length|config)|(token|effort|limit|max)\w*(think|reason)"
)
LONGEST_KEY = 80  # characters of a key that are looked at: the pattern takes time by the square of them
LEAST = BudgetChoice("fixed", 1.0)


@dataclass(frozen=True, slots=True)
class BudgetWish:
    """A budget that a request asks for. `source` is its key, `requested` the value as it was sent."""

    source: str
    requested: Any
    choice: BudgetChoice = AUTO
    coverage: float | None = None


def read_budget(body: dict[str, Any]) -> tuple[BudgetWish | None, list[str]]:
    """Read the budget of a request and the warnings about it; None where none is asked for. Raises RequestError, naming the key."""
    places = [("", body)]
    for name in WRAPPERS:
        if (inner := body.get(name)) is not None:
            places.append((f"{name}.", require_object(inner, name)))
    for where, place in places:
        check_names(place, where)
    off = [where + key for where, place in places for key in SWITCHES for value in values_at(place, key, where) if value is False]
    idle = [f"{name} had no effect here: use budget or reasoning_effort" for name in off]
    found = [(key, where, value) for key in KEYS for where, place in places for value in values_at(place, key, where)]
    wishes = [read_wish(key, where + key, value) for key, where, value in found]
    said = [(wish, where) for wish, (_, where, value) in zip(wishes, found, strict=True) if value is not None]
    if not said:
        return (wishes[0] if wishes else None), idle
    (wish, where), others = said[0], [other.source for other, _ in said[1:]]
    warnings = [f"{wish.source} belongs at the top level of the request: it was honoured here"] if where else []
    return wish, warnings + [f"{name} was not used: {wish.source} comes first" for name in others] + idle


def values_at(place: dict[str, Any], key: str, where: str) -> Iterator[Any]:
    """The value of a key, which may lie in an object: none or one."""
    outer, _, inner = key.partition(".")
    if outer not in place:
        return
    if not inner:
        yield place[outer]
    elif place[outer] is not None:
        held = require_object(place[outer], where + outer)
        if inner in held:
            yield held[inner]
        elif outer == "thinking" and read_thinking_type(held, where) == "disabled":
            yield 0


def read_thinking_type(held: dict[str, Any], where: str) -> str | None:
    kind = held.get("type")
    if kind is not None and kind not in THINKING_TYPES:
        raise RequestError(f"{where}thinking.type must be one of {', '.join(THINKING_TYPES)}", f"{where}thinking.type")
    return kind


def read_wish(key: str, source: str, value: Any) -> BudgetWish:
    """Read one key's value: -1 and null are free, 0 is the least there is."""
    if value is None or (value == -1 and not isinstance(value, bool)):
        return BudgetWish(source, value)
    if key.endswith("effort"):
        return read_effort(source, value)
    if key == "budget" and isinstance(value, str | dict):
        return read_own_budget(source, value)
    return BudgetWish(source, value, read_tokens(source, value))


def read_effort(source: str, value: Any) -> BudgetWish:
    if not isinstance(value, str) or value not in EFFORTS:
        raise RequestError(f"{source} must be one of {', '.join(EFFORTS)}, not {shown(value)}", source)
    factor = EFFORTS[value]
    choice = LEAST if factor == 0 else AUTO if factor == 1 else BudgetChoice("scaled", factor)
    return BudgetWish(source, value, choice)


def read_own_budget(source: str, value: str | dict[str, Any]) -> BudgetWish:
    """Read the forms of `budget` that are no number: "12s", "2x", "90%", {"tokens"|"seconds"|"coverage": ...}."""
    if isinstance(value, str):
        if value.strip() == "0":
            return BudgetWish(source, value, LEAST)
        try:
            ask = choose_budget(Ask(), value)
        except InputError as error:
            raise RequestError(f"{source} {value[:40]!r} is not understood: use {SERVED_FORMS}", source) from error
        return BudgetWish(source, value, ask.choice, ask.coverage)
    if len(value) != 1 or not value.keys() <= {"tokens", "seconds", "coverage"}:
        raise RequestError(f"{source} must have one of tokens, seconds and coverage", source)
    ((unit, amount),) = value.items()
    name = f"{source}.{unit}"
    if unit == "tokens":
        return BudgetWish(source, value, AUTO if amount in (None, -1) else read_tokens(name, amount))
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < (1 if unit == "coverage" else 1e7):
        wanted = "between 0 and 1, such as 0.9" if unit == "coverage" else "above 0 and below 10,000,000"
        raise RequestError(f"{name} must be a number {wanted}, not {shown(amount)}", name)
    if unit == "coverage":
        return BudgetWish(source, value, AUTO, float(amount))
    return BudgetWish(source, value, BudgetChoice("seconds", float(amount)))


def read_tokens(name: str, value: Any) -> BudgetChoice:
    is_whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    if isinstance(value, bool) or not is_whole or not 0 <= value <= MAX_BUDGET:
        raise RequestError(f"{name} must be a whole number of tokens from 0 to {MAX_BUDGET}, or -1 for none, not {shown(value)}", name)
    return BudgetChoice("fixed", float(value)) if value else LEAST


def check_names(place: dict[str, Any], where: str) -> None:
    """Raise RequestError for an unknown key that looks like a budget, and suggest the right one."""
    known = {key.partition(".")[0] for key in KEYS}
    nested = {outer: {"type", *(key.partition(".")[2] for key in KEYS if key.startswith(f"{outer}."))} for outer in NESTED}
    unknown = [(key, where + key) for key in place if key not in known]
    for outer in NESTED:
        if isinstance(place.get(outer), dict):
            unknown += [(key, f"{where}{outer}.{key}") for key in place[outer] if key not in nested[outer]]
    for key, name in unknown:
        word, name = key[:LONGEST_KEY].lower(), name[:LONGEST_KEY]
        if LOOKS_LIKE_A_BUDGET.search(word):
            right = get_close_matches(word, KEYS, n=1) or ["budget"]
            raise RequestError(f"{' '.join(name.split())} is not known here: did you mean {right[0]}?", name, "unknown_budget")


def require_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object, not {shown(value)}", name)
    return value


def shown(value: Any) -> str:
    """A value in an error line, cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
