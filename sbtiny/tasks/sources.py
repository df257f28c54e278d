"""Where questions come from: JSON Lines told by their keys, the hub's sets, the generated task.

A file is used whole, whatever the split. `data.jsonl#1000` is a sample of 1000 rows: drawn with seed 0, kept in the
file's order.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from sbtiny.errors import InputError
from sbtiny.tasks.answers import given_answer

SPLITS = ("train", "val", "test")
HUB_TASKS = ("gsm8k", "math", "math500", "aime25", "still3", "s1k")  # tasks/hub.py
TASKS = ("arithmetic", *HUB_TASKS)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its reference answer: the final answer only."""

    id: str
    question: str
    answer: str
    level: int | None = None
    source: str = ""
    where: str = field(default="", compare=False, repr=False)  # file and line it was read from

    @property
    def named(self) -> str:
        """How the user finds it."""
        return self.where or f"question {self.id}"


Row = dict[str, Any]
Item = TypeVar("Item")


def load_questions(task: str, split: str, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of `arithmetic`, of a named set of the hub, or of a JSON Lines file.

    `limit` takes the first rows of a file, and of a hub dataset a sample drawn with `seed`. Raises InputError for an
    unknown task or split, a file that cannot be used, and a hub that cannot be reached.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}{suggestion(split, SPLITS)}: choose from {', '.join(SPLITS)}")
    if task == "arithmetic":
        from sbtiny.tasks import arithmetic

        return arithmetic.questions(split, limit, seed)
    if task in HUB_TASKS:
        from sbtiny.tasks import hub

        return sample(hub.questions(task, split), limit, seed)
    if not Path(task).exists() and not re.search(r"[/\\#]|\.jsonl?$", task):
        near = suggestion(task, [*TASKS, *(path.name for path in Path().glob("*.jsonl"))])
        raise InputError(f"unknown task {task!r}{near}: choose from {', '.join(TASKS)}, or give a JSON Lines file")
    return read_questions(task, limit)


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file of question/answer or messages rows.

    An `answer` may be a number, or a worked solution that ends in `#### 72`. Of messages, the last user turn is the
    question; the answer is the row's `answer`, else the one given in the assistant turn after it (boxed, after ####,
    after `answer is`), else that whole turn.
    """
    found: dict[str, Question] = {}
    for number, row in numbered_rows(path)[:limit]:
        where = f"{path}, line {number}"
        question = to_question(row, where, f"{stem(path)}-{number:05d}")
        if question.id in found:
            raise InputError(f"{where}: an earlier row has the id {question.id!r} too: give each row its own")
        found[question.id] = question
    return list(found.values())


def read_rows(path: str) -> list[Row]:
    """The objects of a JSON Lines file, or of the sample `path#N`. Raises InputError with the line of what is wrong."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str) -> list[tuple[int, Row]]:
    """(line number, row), blank lines left out."""
    file, size = Path(path).expanduser(), None
    if "#" in path and not file.exists():
        head, _, count = path.rpartition("#")
        if not count.isascii() or not count.isdigit() or int(count) < 1:
            raise InputError(f"{path}: write the sample as {head}#1000, a whole number of rows above 0")
        file, size = Path(head).expanduser(), int(count)
    rows = [
        (number, parse_row(line, f"{file}, line {number}"))
        for number, line in enumerate(file_lines(file), 1)
        if line.strip()
    ]
    if not rows:
        raise InputError(f"{file} is empty: it needs one JSON object a line")
    return sample(rows, size, seed=0)


def file_lines(file: Path) -> list[bytes]:
    if file.is_dir():
        inside = sorted(path.name for path in file.glob("*.jsonl"))[:5]
        raise InputError(f"{file} is a folder: give a file in it{', such as ' + ', '.join(inside) if inside else ''}")
    if not file.is_file():
        near = suggestion(file.name, [path.name for path in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise InputError(f"no file {file}{near}: check the path")
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def parse_row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}, byte {error.start + 1}: not UTF-8 text: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        reason = f"broken JSON ({error.msg}): write one whole object a line"
        raise InputError(f"{where}, column {error.colno}: {reason}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise InputError(f"{where}: unusable JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not an object: write one JSON object a line, in no list")
    return row


def to_question(row: Row, where: str, default_id: str) -> Question:
    if "messages" in row:
        row = row | from_messages(row, where)
    elif "question" not in row and {"prompt", "completion"} <= row.keys():
        raise InputError(f"{where}: prompt and completion are for --traces: questions need question and answer")
    answer = text(row, "answer", where).rpartition("####")[2].strip()
    if not answer:
        raise InputError(f"{where}: nothing follows #### in 'answer'")
    name = default_id if row.get("id") is None else text(row, "id", where)
    source = row.get("source") or ""
    return Question(name, text(row, "question", where), answer, level(row, where), str(source), where)


def from_messages(row: Row, where: str) -> Row:
    """question and, unless the row has one, answer."""
    question, replies, _ = last_exchange(row, where)
    if row.get("answer") is not None:
        return {"question": question}
    if not replies:
        raise InputError(f"{where}: no assistant turn follows the last user turn: add one, or an 'answer' key")
    reply = text(replies[-1], "content", where)
    return {"question": question, "answer": given_answer(reply) or reply}


def last_exchange(row: Row, where: str) -> tuple[str, list[Row], int]:
    """What the last user turn says, the assistant's turns after it, and the number of user turns before it."""
    turns = row["messages"]
    shaped = isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    if not shaped:
        raise InputError(f"{where}: 'messages' must be a list of objects with role and content")
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise InputError(f"{where}: 'messages' has no user turn to take the question from")
    replies = [turn for turn in turns[users[-1] :] if turn["role"] == "assistant"]
    return text(turns[users[-1]], "content", where), replies, len(users) - 1


def text(row: Row, key: str, where: str) -> str:
    """The text, or the finite number as text, under a key that must be there and not be empty."""
    if key not in row:
        keys = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{where} has no {key!r}{suggestion(key, row)}: rename or add it (keys found: {keys})")
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}: it must be text that is not empty")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where}: {key!r} has a lone surrogate (\\ud800 to \\udfff), which is no text: remove it")
    return value.strip()


def level(row: Row, where: str) -> int | None:
    """A whole number, also as text (`Level 5`); None for text without one (MATH has `Level ?`)."""
    value = row.get("level")
    if isinstance(value, str):
        digits = re.search("[0-9]{1,9}", value)
        return int(digits[0]) if digits else None
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0):
        return None if value is None else int(value)
    raise InputError(f"{where}: 'level' is {json.dumps(value)[:40]}: it must be a whole number")


def sample(items: list[Item], size: int | None, seed: int) -> list[Item]:
    """`size` items drawn with the seed, in their old order; all of them where there are no more."""
    if size is None or size >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), size))]


def suggestion(name: str, known: Iterable[str]) -> str:
    by_lower = {key.lower(): key for key in known}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""


def stem(path: str) -> str:
    return Path(path.rpartition("#")[0] or path).stem
