"""Questions, and files of them in any common shape of rows.

Every split of a file is the whole file. `data.jsonl#1000` is a sample of 1000 rows, drawn with seed 0, in the file's order.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.tasks.answers import marked_answer, unwrap_reference
from sbtiny.tasks.fields import find_key, is_number, preview_value, read_text, suggestion, wrong_value
from sbtiny.tasks.row_files import ENDINGS, Row, format_row_location, read_file
from sbtiny.tasks.row_shapes import Example, read_row

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
    where: str = field(default="", compare=False, repr=False)  # file and line
    system: str | None = field(default=None, repr=False)  # system turn of a chat; see `identity`
    pattern: str = field(default="", compare=False, repr=False)  # the reference as it is written, for the verifier `regex`

    @property
    def location(self) -> str:
        """The place to name in a message."""
        return self.where or f"question {self.id}"


Item = TypeVar("Item")


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """Read the first `limit` questions of a file of rows of any shape (`row_shapes.py`).

    An `answer` may be a number; `reference` removes its wrapping. The question of a chat is the last user turn. Without an
    `answer`, the marked answer of the row's solution counts (boxed, after ####, after `answer is`), or a chat's whole reply.
    """
    questions: dict[str, Question] = {}
    for number, row in numbered_rows(path)[:limit]:
        where = format_row_location(path, number)
        question = parse_question(row, where, f"{file_stem(path)}-{number:05d}")
        if question.id in questions:
            raise InputError(f"{where}: an earlier row has the id {question.id!r} too: give each row its own")
        questions[question.id] = question
    return list(questions.values())


def read_rows(path: str) -> list[Row]:
    """Read the objects of a file, or of the sample `path#N`. Raises InputError with the place of the fault."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str) -> list[tuple[int, Row]]:
    """Read (number, row), without blank lines; see `row_files.format_row_location`."""
    file, size = locate_sample(path)
    check_file(file)
    rows = read_file(file)
    if not rows:
        raise InputError(f"{file} is empty: it needs one JSON object a line")
    return subsample(rows, size, seed=0)


def locate_sample(path: str) -> tuple[Path, int | None]:
    """The file and the N of `path#N`; N is None without one, and where a file has the whole name."""
    file = Path(expand_home(path))
    if "#" not in path or file.exists():
        return file, None
    head, _, count = path.rpartition("#")
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise InputError(f"{path}: write the sample as {head}#1000, a whole number of rows above 0")
    return Path(expand_home(head)), int(count)


def check_file(file: Path) -> None:
    try:
        is_folder = file.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot read {str(file)[:80]}...: {error.strerror}") from error
    if is_folder:
        files = list_row_files(file)[:5]
        raise InputError(f"{file} is a folder: give a file in it{', such as ' + ', '.join(files) if files else ''}")
    if not file.is_file():
        near = suggestion(file.name, [path.name for path in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise InputError(f"no file {file}{near}: check the path")


def list_row_files(folder: Path) -> list[str]:
    """List the files of rows in a folder."""
    return sorted(path.name for path in folder.glob("*") if path.name.endswith(ENDINGS))


def parse_question(row: Row, where: str, default_id: str) -> Question:
    example = read_row(row, where)
    given = example.answer or find_answer(example, row, where)
    return build_question(row, example, given, where, default_id)


def build_question(row: Row, example: Example, given: str, where: str, default_id: str) -> Question:
    """Build the question of a row; its reference is the answer in `given`."""
    answer = unwrap_reference(given)
    if not answer:
        raise InputError(f"{where}: {'nothing follows ####' if '####' in given else 'nothing is left'} in 'answer' {preview_value(given)}")
    name = default_id if row.get("id") is None else read_text(row, "id", where)
    source = str(row.get("source") or "")
    pattern = given.rpartition("####")[2].strip()
    return Question(name, example.question, answer, read_level(row, where), source, where, example.system, pattern)


def find_answer(example: Example, row: Row, where: str) -> str:
    """Read the answer of a row without a reference from its response. Raises InputError where there is none."""
    if example.response is None:
        if example.chat:
            raise InputError(f"{where}: no assistant turn follows the last user turn: add one, or an 'answer' key")
        return read_text(row, "answer", where)
    answer = marked_answer(example.spoken)
    if answer is None and not example.chat:
        hint = f"add an 'answer', or a {example.key} that boxes its own"
        keys = f"{find_key(row, 'question')} and {example.key}"
        raise InputError(f"{where}: {keys} are for --traces: questions need question and answer ({hint})")
    return answer or example.spoken


def digest_items(items: Sequence[Any]) -> list[Any]:
    """Return the content of questions or rows for a digest. A missing system turn is left out, so that older digests stay valid."""
    return [(item, item.system) if isinstance(item, Question) and item.system else item for item in items]


def read_level(row: Row, where: str) -> int | None:
    """Read a whole number, also from text (`Level 5`). None for text without one (MATH has `Level ?`)."""
    value = row.get("level")
    if isinstance(value, str):
        digits = re.search("[0-9]{1,9}", value)
        return int(digits[0]) if digits else None
    if value is not None and not (is_number(value) and value % 1 == 0):
        raise wrong_value(row, "level", where, "a whole number")
    return None if value is None else int(value)


def subsample(items: list[Item], size: int | None, seed: int) -> list[Item]:
    """Draw `size` items with the seed, in their old order; all items where there are fewer."""
    if size is None or size >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), size))]


def file_stem(path: str) -> str:
    return Path((path.rpartition("#")[0] or path).removesuffix(".gz")).stem
