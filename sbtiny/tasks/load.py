"""Load questions by task: the generated task, a named data set of the hub, or a file."""

import re
from pathlib import Path

from sbtiny.errors import InputError
from sbtiny.tasks import arithmetic, hub
from sbtiny.tasks.fields import suggestion
from sbtiny.tasks.row_files import ENDINGS
from sbtiny.tasks.sources import HUB_TASKS, SPLITS, TASKS, Question, list_row_files, read_questions, subsample


def load_questions(task: str, split: str, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Load questions of `arithmetic`, of a named data set of the hub, or of a file.

    `limit` takes the first rows of a file and a sample, drawn with `seed`, of a hub data set. Raises InputError for an
    unknown task or split, an unusable file and a failed download.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}{suggestion(split, SPLITS)}: choose from {', '.join(SPLITS)}")
    if task == "arithmetic":
        return arithmetic.generate_questions(split, limit, seed)
    if task in HUB_TASKS:
        return subsample(hub.load_hub_questions(task, split), limit, seed)
    if not Path(task).exists() and not re.search(r"[/\\#]", task) and not task.endswith(ENDINGS):
        near = suggestion(task, [*TASKS, *list_row_files(Path())])
        raise InputError(f"unknown task {task!r}{near}: choose from {', '.join(TASKS)}, or give a JSON Lines file")
    return read_questions(task, limit)
