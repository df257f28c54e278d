"""Keep evaluation questions out of training: a question is the same where its words and numbers are."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from sbtiny.errors import InputError
from sbtiny.tasks.sources import HUB_TASKS, load_questions


class Asked(Protocol):
    """What has a question: Question, Trace."""

    question: str


Item = TypeVar("Item", bound=Asked)


def fingerprint(question: str) -> str:
    """A hash of the words and numbers alone: case, white space, punctuation and the form of letters are nothing."""
    plain = unicodedata.normalize("NFKC", question).casefold()
    words = re.findall(r"\w+(?:[.,]\d+)*|[-+*/^=<>]", plain)
    return blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


def apart(items: Sequence[Item], heldout: Iterable[Asked], of: str) -> tuple[list[Item], int]:
    """The items whose question is none of `heldout`, and how many were. Raises InputError when nothing is left."""
    kept_out = {fingerprint(item.question) for item in heldout}
    kept = [item for item in items if fingerprint(item.question) not in kept_out]
    if items and not kept:
        raise InputError(f"every question is an evaluation question of {of}: train on others, or set eval.task")
    return kept, len(items) - len(kept)


def without_heldout(items: Sequence[Item], task: str, split: str, say: Callable[[str], None]) -> tuple[list[Item], int]:
    """`apart` from all questions that `sbtiny eval` would draw from; a hub's set that is not at hand is told and not compared."""
    try:
        heldout = load_questions(task, split, None)
    except InputError as error:
        if task not in HUB_TASKS:
            raise
        say(f"not compared with the evaluation questions of {task}: {error}")
        return list(items), 0
    return apart(items, heldout, task)
