"""Where questions come from: files of rows in any common shape, the hub's sets, the generated task.

A file is used whole, whatever the split. `data.jsonl#1000` is a sample of 1000 rows: drawn with seed 0, kept in the
file's order.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sbtiny.errors import InputError
from sbtiny.tasks.answers import given_answer, reference
from sbtiny.tasks.row_files import ENDINGS, Row, locate, read_file
from sbtiny.tasks.row_shapes import Example, held, read_row, shown, suggestion, text

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
    system: str | None = field(default=None, repr=False)  # what the chat was set to; see `identity`

    @property
    def named(self) -> str:
        """How the user finds it."""
        return self.where or f"question {self.id}"


Item = TypeVar("Item")


def load_questions(task: str, split: str, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of `arithmetic`, of a named set of the hub, or of a file.

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
    if not Path(task).exists() and not re.search(r"[/\\#]", task) and not task.endswith(ENDINGS):
        near = suggestion(task, [*TASKS, *readable(Path())])
        raise InputError(f"unknown task {task!r}{near}: choose from {', '.join(TASKS)}, or give a JSON Lines file")
    return read_questions(task, limit)


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file of rows of any shape (`shapes.py`).

    An `answer` may be a number, or stand in what `reference` takes off. Of a chat, the last user turn is the question.
    Without an `answer`, it is the one that the row's solution gives expressly (boxed, after ####, after `answer is`); of a
    chat else the whole reply.
    """
    found: dict[str, Question] = {}
    for number, row in numbered_rows(path)[:limit]:
        where = locate(path, number)
        question = to_question(row, where, f"{stem(path)}-{number:05d}")
        if question.id in found:
            raise InputError(f"{where}: an earlier row has the id {question.id!r} too: give each row its own")
        found[question.id] = question
    return list(found.values())


def read_rows(path: str) -> list[Row]:
    """The objects of a file, or of the sample `path#N`. Raises InputError with the place of what is wrong."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str) -> list[tuple[int, Row]]:
    """(line number, row), blank lines left out; see `files.locate`."""
    file, size = Path(path).expanduser(), None
    if "#" in path and not file.exists():
        head, _, count = path.rpartition("#")
        if not count.isascii() or not count.isdigit() or int(count) < 1:
            raise InputError(f"{path}: write the sample as {head}#1000, a whole number of rows above 0")
        file, size = Path(head).expanduser(), int(count)
    check_file(file)
    rows = read_file(file)
    if not rows:
        raise InputError(f"{file} is empty: it needs one JSON object a line")
    return sample(rows, size, seed=0)


def check_file(file: Path) -> None:
    if file.is_dir():
        inside = readable(file)[:5]
        raise InputError(f"{file} is a folder: give a file in it{', such as ' + ', '.join(inside) if inside else ''}")
    if not file.is_file():
        near = suggestion(file.name, [path.name for path in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise InputError(f"no file {file}{near}: check the path")


def readable(folder: Path) -> list[str]:
    """Files of rows in a folder."""
    return sorted(path.name for path in folder.glob("*") if path.name.endswith(ENDINGS))


def to_question(row: Row, where: str, default_id: str) -> Question:
    example = read_row(row, where)
    given = example.answer or answer_in(example, row, where)
    return question_of(row, example, given, where, default_id)


def question_of(row: Row, example: Example, given: str, where: str, default_id: str) -> Question:
    """The question of a row that was read; its reference is what `given` says."""
    answer = reference(given)
    if not answer:
        raise InputError(f"{where}: {'nothing follows ####' if '####' in given else 'nothing is left'} in 'answer' {shown(given)}")
    name = default_id if row.get("id") is None else text(row, "id", where)
    source = str(row.get("source") or "")
    return Question(name, example.question, answer, level(row, where), source, where, example.system)


def answer_in(example: Example, row: Row, where: str) -> str:
    """The answer that a row without a reference gives. Raises InputError where it gives none that could be one."""
    if example.response is None:
        if example.chat:
            raise InputError(f"{where}: no assistant turn follows the last user turn: add one, or an 'answer' key")
        return text(row, "answer", where)
    found = given_answer(example.spoken)
    if found is None and not example.chat:
        asked = held(row, "question")
        mend = f"add an 'answer', or a {example.key} that boxes its own"
        raise InputError(f"{where}: {asked} and {example.key} are for --traces: questions need question and answer ({mend})")
    return found or example.spoken


def identity(items: Sequence[Any]) -> list[Any]:
    """What of questions or rows a digest is made of; a system turn counts where there is one, so that older digests hold."""
    return [(item, item.system) if isinstance(item, Question) and item.system else item for item in items]


def level(row: Row, where: str) -> int | None:
    """A whole number, also as text (`Level 5`); None for text without one (MATH has `Level ?`)."""
    value = row.get("level")
    if isinstance(value, str):
        digits = re.search("[0-9]{1,9}", value)
        return int(digits[0]) if digits else None
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0):
        return None if value is None else int(value)
    raise InputError(f"{where}: 'level' is {shown(value)}: it must be a whole number")


def sample(items: list[Item], size: int | None, seed: int) -> list[Item]:
    """`size` items drawn with the seed, in their old order; all of them where there are no more."""
    if size is None or size >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), size))]


def stem(path: str) -> str:
    return Path((path.rpartition("#")[0] or path).removesuffix(".gz")).stem
