"""Keep evaluation questions out of training. Questions with the same words and numbers are the same."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks import hub
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import HUB_TASKS, TASKS


class HasQuestion(Protocol):
    """An object with a question and the place it was read from: Question, Trace, LabelledRow."""

    question: str
    where: str


Item = TypeVar("Item", bound=HasQuestion)
SHOWN_PLACES = 5  # places in the message


def drop_eval_questions(items: Sequence[Item], source: str, settings: Settings) -> tuple[list[Item], int]:
    """Remove the questions of `sbtiny eval` and of cached public test sets; returns (items, how many were removed).

    The splits of the generated task are disjoint already.
    """
    e = settings.eval
    allowed = list(items) if source == e.task == "arithmetic" else without_eval_questions(items, e.task, e.split, settings.seed)
    return allowed, len(items) - len(allowed)


def without_eval_questions(items: Sequence[Item], task: str, split: str, seed: int = 0) -> list[Item]:
    """Return the items that no evaluation asks: neither `task` nor cached public test sets. A hub set that cannot be loaded is skipped."""
    allowed = list(items)
    for name, part in heldout_splits(task, split):
        try:
            heldout = load_questions(name, part, None, seed)
        except InputError as error:
            if name not in HUB_TASKS:
                raise
            warn(f"not compared with the evaluation questions of {name}: {error}")
        else:
            allowed = leave_out(allowed, heldout, f"an evaluation question of {name}", f"evaluation questions of {name}")
    return allowed


def heldout_splits(task: str, split: str) -> list[tuple[str, str]]:
    """List (task, split) that training must avoid: the configured evaluation, unless it is a train split, and cached public test sets."""
    own = [(task, split)] if split != "train" or task not in TASKS else []  # a file is used whole, whatever the split
    return own + [(name, "test") for name in HUB_TASKS if (name, "test") not in own and hub.is_cached(name, "test")]


def leave_out(items: Sequence[Item], others: Iterable[HasQuestion], one: str, many: str) -> list[Item]:
    """Return the items whose question is not in `others`; report the rest as `many`. Raises InputError, with `one`, when none is left."""
    hashes = {hash_question(item.question) for item in others}
    excluded = [item for item in items if hash_question(item.question) in hashes]
    if items and len(excluded) == len(items):
        first = f" (the first: {items[0].where})" if items[0].where else ""
        raise InputError(f"every question is {one}{first}: use others")
    if excluded:
        places = [item.where for item in excluded if item.where]
        more = ["..."] if len(places) > SHOWN_PLACES else []
        warn(f"{many} left out: {'; '.join([str(len(excluded)), *places[:SHOWN_PLACES], *more])}")
    return [item for item in items if hash_question(item.question) not in hashes]


def hash_question(question: str) -> str:
    """Hash the words and numbers of a question, without case, white space, punctuation and Unicode form."""
    plain = unicodedata.normalize("NFKC", question).casefold()
    words = re.findall(r"\w+(?:[.,]\d+)*|[-+*/^=<>]", plain)
    return blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


def warn(message: str) -> None:
    console.print(message, markup=False, style="yellow", soft_wrap=True)
