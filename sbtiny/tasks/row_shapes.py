r"""Rows as people have them, read as ours: question and, where the row has them, system, answer and response.

| what              | keys                                                                                                |
|-------------------|-----------------------------------------------------------------------------------------------------|
| ours              | question, answer, response                                                                          |
| MATH, NuminaMath  | problem, solution (the response), answer (the reference)                                            |
| Alpaca            | instruction, input, output                                                                          |
| TRL               | prompt, completion: each a text, or a list of turns                                                 |
| chats             | messages, or conversations, of role and content, or of from and value; content may be a list of parts |

Thoughts that stand apart from their answer (`reasoning_content`) go before it, in `<think>`: both formats read that, `solution` as words.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from sbtiny.budget.protocol import THINK
from sbtiny.errors import InputError
from sbtiny.tasks.row_files import Row

# Our key -> theirs; the first that holds something counts.
KEYS = {
    "question": ("question", "problem", "instruction", "prompt"),
    "response": ("response", "solution", "generated_solution", "output", "completion"),
    "answer": ("answer", "expected_answer", "final_answer", "ground_truth"),
    "turns": ("messages", "conversations", "conversation"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "thoughts": ("reasoning_content", "reasoning", "thinking"),
}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
SHOWN = 12  # keys that are named
Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """What a row says. `key` is where its response stands; a `chat` is one of turns."""

    question: str
    system: str | None = None
    answer: str | None = None
    response: str | None = None
    key: str = ""
    chat: bool = False

    @property
    def spoken(self) -> str:
        """The response without its thoughts."""
        return (self.response or "").rpartition(THINK.closing)[2].strip()


def read_row(row: Row, where: str, single: bool = False) -> Example:
    """Read a row of any known shape; the response of a chat only where it is needed. Raises InputError for another shape.

    `single`: the turns must be one question and one reply; else the last question counts.
    """
    key = held(row, "answer")
    answer = text(row, key, where) if key else None
    if turns := read_turns(row, where):
        found = exchange(turns, where, single, wanted=single or answer is None)
    else:
        key = held(row, "response") or ""
        response = with_thoughts(row, text(row, key, where), where) if key and (single or answer is None) else None
        found = Example(asked(row, where), response=response, key=key)
    system = text(row, "system", where) if row.get("system") and not found.system else found.system
    return replace(found, answer=answer, system=system)


def asked(row: Row, where: str) -> str:
    """The question; Alpaca's `input` is the rest of its instruction."""
    key = held(row, "question") or "question"
    more = [text(row, "input", where)] if key == "instruction" and row.get("input") else []
    return "\n\n".join([text(row, key, where), *more])


def held(row: Row, what: str) -> str | None:
    """The row's key for that of ours."""
    return next((key for key in KEYS[what] if row.get(key) is not None), None)


def read_turns(row: Row, where: str) -> list[Turn]:
    """Turns of role and content, none where the row is no chat. Of TRL's prompt and completion either may be a list of them."""
    key = held(row, "turns")
    if key:
        return [turn_of(turn, key, where) for turn in listed(row[key], key, where)]
    if not any(isinstance(row.get(key), list) for key in ("prompt", "completion")) or held(row, "question") != "prompt":
        return []
    found = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        given = row.get(key)
        said = given if isinstance(given, list) else [] if given is None else [{"role": role, "content": given}]
        found += [turn_of(turn, key, where) for turn in said]
    return found


def listed(turns: Any, key: str, where: str) -> list[Any]:
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: {key!r} must be a list of objects with role and content")
    return turns


def turn_of(turn: Any, key: str, where: str) -> Turn:
    if not isinstance(turn, dict) or not (role := held(turn, "role")):
        raise InputError(f"{where}: {key!r} must be a list of objects with role and content")
    name = str(turn[role])
    return turn | {"role": ROLES.get(name, name), "in": key}


def exchange(turns: list[Turn], where: str, single: bool, wanted: bool) -> Example:
    """What the last user turn asks, what the system turns before it set, and, where `wanted`, the reply after it."""
    key = turns[0]["in"]
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise InputError(f"{where}: {key!r} has no user turn to take the question from")
    before, after = turns[: users[-1]], turns[users[-1] + 1 :]
    apart = [turn["role"] for turn in after] != ["assistant"] or any(turn["role"] != "system" for turn in before)
    if single and apart:
        raise InputError(f"{where}: {key!r} must be one user turn and the assistant's after it: one question, one answer")
    systems = [said(turn, where) for turn in before if turn["role"] == "system" and turn.get(held(turn, "content")) != ""]
    replies = [turn for turn in after if turn["role"] == "assistant"] if wanted else []
    response = with_thoughts(replies[-1], said(replies[-1], where), where) if replies else None
    return Example(said(turns[users[-1]], where), "\n\n".join(systems) or None, response=response, key=key, chat=True)


def said(turn: Turn, where: str) -> str:
    """The text of a turn, also of one in parts."""
    key = held(turn, "content") or "content"
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text(turn, key, where)
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where}: a part of {key!r} is of type {shown(kind)}: only parts of type text can be read")
    return text({key: "".join(part["text"] for part in parts)}, key, where)


def with_thoughts(row: Row, answer: str, where: str) -> str:
    """The answer behind the thoughts that a row or turn keeps apart from it, unless it holds them already."""
    key = next((key for key in KEYS["thoughts"] if isinstance(row.get(key), str) and row[key].strip()), None)
    if not key or THINK.closing in answer:
        return answer
    thoughts = text(row, key, where).removeprefix(THINK.opening).removesuffix(THINK.closing).strip()
    return f"{THINK.opening}\n{thoughts}\n{THINK.closing}\n\n{answer}"


def text(row: Row, key: str, where: str) -> str:
    """The text, or the finite number as text, under a key that must be there and not be empty."""
    if key not in row:
        keys = ", ".join([*(repr(found)[:40] for found in list(row)[:SHOWN]), *["..."] * (len(row) > SHOWN)]) or "none"
        also = f", or {', '.join([*KEYS[key][1:], *(KEYS['turns'] if key == 'question' else ())])}" if key in KEYS else ""
        raise InputError(f"{where} has no {key!r}{suggestion(key, row)}: rename or add it{also} (keys found: {keys})")
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key!r} is {shown(value)}: it must be text that is not empty")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where}: {key!r} has a lone surrogate (\\ud800 to \\udfff), which is no text: remove it")
    return value.strip()


def shown(value: Any) -> str:
    """The beginning of a value; Parquet has some that JSON has not."""
    return json.dumps(value, default=repr)[:40]


def suggestion(name: str, known: Iterable[str]) -> str:
    by_lower = {key.lower(): key for key in known}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
