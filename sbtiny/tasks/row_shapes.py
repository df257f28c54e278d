r"""Read rows of any common shape: question and, where present, system, answer and response.

| what              | keys                                                                                                |
|-------------------|-----------------------------------------------------------------------------------------------------|
| ours              | question, answer, response                                                                          |
| MATH, NuminaMath  | problem, solution (the response), answer (the reference)                                            |
| Alpaca            | instruction, input, output                                                                          |
| TRL               | prompt, completion: each a text, or a list of turns                                                 |
| chats             | messages, or conversations, of role and content, or of from and value; content may be a list of parts |

Separate thoughts (`reasoning_content`) go before the answer in `<think>`. The format `solution` reads these tags as words.
"""

from dataclasses import dataclass, replace
from typing import Any

from sbtiny.budget.protocol import THINK
from sbtiny.errors import InputError
from sbtiny.tasks.fields import KEYS, find_key, preview_value, read_text
from sbtiny.tasks.row_files import Row

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """The content of a row. `key` is the key of its response; `chat`: the row is a list of turns."""

    question: str
    system: str | None = None
    answer: str | None = None
    response: str | None = None
    key: str = ""
    chat: bool = False

    @property
    def spoken(self) -> str:
        """The response without thoughts."""
        return (self.response or "").rpartition(THINK.closing)[2].strip()


def read_row(row: Row, where: str, single: bool = False) -> Example:
    """Read a row of any known shape; the response only where it is needed. Raises InputError for another shape.

    `single`: the turns must be one question and one reply. Otherwise the last question counts.
    """
    key = find_key(row, "answer")
    answer = read_text(row, key, where) if key else None
    if turns := read_turns(row, where):
        example = read_exchange(turns, where, single, wanted=single or answer is None)
    else:
        key = find_key(row, "response") or ""
        response = with_thoughts(row, read_text(row, key, where), where) if key and (single or answer is None) else None
        example = Example(question_text(row, where), response=response, key=key)
    system = read_text(row, "system", where) if row.get("system") and not example.system else example.system
    return replace(example, answer=answer, system=system)


def question_text(row: Row, where: str) -> str:
    """Read the question. Alpaca's `input` continues its instruction."""
    key = find_key(row, "question") or "question"
    rest = [read_text(row, "input", where)] if key == "instruction" and row.get("input") else []
    return "\n\n".join([read_text(row, key, where), *rest])


def read_turns(row: Row, where: str) -> list[Turn]:
    """Read the turns of a chat; none for another row. TRL's prompt and completion may each be a text or a list of turns."""
    key = find_key(row, "turns")
    if key:
        return normalize_turns(row[key], key, where)
    if not any(isinstance(row.get(key), list) for key in ("prompt", "completion")) or find_key(row, "question") != "prompt":
        return []
    turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        part = value if isinstance(value, list) else [{"role": role, "content": value}]
        turns += normalize_turns(part, key, where) if value not in (None, []) else []
    return turns


def normalize_turns(turns: Any, key: str, where: str) -> list[Turn]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) and find_key(turn, "role") for turn in turns):
        raise InputError(f"{where}: {key!r} must be a list of objects with role and content")
    names = [str(turn[find_key(turn, "role")]) for turn in turns]
    return [turn | {"role": ROLES.get(name, name), "in": key} for turn, name in zip(turns, names, strict=True)]


def read_exchange(turns: list[Turn], where: str, single: bool, wanted: bool) -> Example:
    """Read the last user turn, the system turns before it and, where `wanted`, the reply after it."""
    key = turns[0]["in"]
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise InputError(f"{where}: {key!r} has no user turn to take the question from")
    before, after = turns[: users[-1]], turns[users[-1] + 1 :]
    is_longer = [turn["role"] for turn in after] != ["assistant"] or any(turn["role"] != "system" for turn in before)
    if single and is_longer:
        raise InputError(f"{where}: {key!r} must be one user turn and the assistant's after it: one question, one answer")
    systems = [turn_text(turn, where) for turn in before if turn["role"] == "system" and turn.get(find_key(turn, "content")) != ""]
    replies = [turn for turn in after if turn["role"] == "assistant"] if wanted else []
    response = with_thoughts(replies[-1], turn_text(replies[-1], where), where) if replies else None
    return Example(turn_text(turns[users[-1]], where), "\n\n".join(systems) or None, response=response, key=key, chat=True)


def turn_text(turn: Turn, where: str) -> str:
    """Read the text of a turn; text parts are joined."""
    key = find_key(turn, "content") or "content"
    parts = turn.get(key)
    if not isinstance(parts, list):
        return read_text(turn, key, where)
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where}: a part of {key!r} is of type {preview_value(kind)}: only parts of type text can be read")
    return read_text({key: "".join(part["text"] for part in parts)}, key, where)


def with_thoughts(row: Row, answer: str, where: str) -> str:
    """Put the separate thoughts of a row or turn before its answer, unless the answer already has thoughts."""
    key = next((key for key in KEYS["thoughts"] if isinstance(row.get(key), str) and row[key].strip()), None)
    if not key or THINK.closing in answer:
        return answer
    thoughts = read_text(row, key, where).removeprefix(THINK.opening).removesuffix(THINK.closing).strip()
    return f"{THINK.opening}\n{thoughts}\n{THINK.closing}\n\n{answer}"
