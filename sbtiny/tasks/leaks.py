"""Keep evaluation questions out of training. Questions with the same words and numbers are the same."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import HUB_TASKS, TASKS


class HasQuestion(Protocol):
    """An object with a question and the place it was read from: Question, Trace, Labelled."""

    question: str
    where: str


Item = TypeVar("Item", bound=HasQuestion)
SHOWN_PLACES = 5  # places in the message


def hash_question(question: str) -> str:
    """Hash the words and numbers of a question, without case, white space, punctuation and Unicode form."""
    plain = unicodedata.normalize("NFKC", question).casefold()
    words = re.findall(r"\w+(?:[.,]\d+)*|[-+*/^=<>]", plain)
    return blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


def split_heldout(items: Sequence[Item], heldout: Iterable[HasQuestion], of: str, say: Callable[[str], None]) -> list[Item]:
    """Return the items whose question is not in `heldout`; report the others. Raises InputError when nothing is left."""
    allowed, excluded = partition(items, heldout)
    if items and not allowed:
        raise InputError(f"every question is an evaluation question of {of}{first_place(items)}: train on others")
    if excluded:
        say(f"evaluation questions of {of} left out: {list_places(excluded)}")
    return allowed


def split_trained(items: Sequence[Item], trained: Iterable[HasQuestion], of: str, say: Callable[[str], None]) -> list[Item]:
    """Return the items whose question is not in `trained`; report the others. Raises InputError when nothing is left."""
    allowed, excluded = partition(items, trained)
    if items and not allowed:
        raise InputError(f"every question was in the training of {of}{first_place(items)}: calibrate on others")
    if excluded:
        say(f"questions that {of} was trained on left out: {list_places(excluded)}")
    return allowed


def partition(items: Sequence[Item], others: Iterable[HasQuestion]) -> tuple[list[Item], list[Item]]:
    """Split into the items whose question is not in `others`, and those whose is."""
    hashes = {hash_question(item.question) for item in others}
    apart, shared = [], []
    for item in items:
        (shared if hash_question(item.question) in hashes else apart).append(item)
    return apart, shared


def first_place(items: Sequence[HasQuestion]) -> str:
    return f" (the first: {items[0].where})" if items[0].where else ""


def list_places(items: Sequence[HasQuestion]) -> str:
    """`7; mine.jsonl, line 1; ...`: how many, and the places of the first."""
    places = [item.where for item in items if item.where]
    more = ["..."] if len(places) > SHOWN_PLACES else []
    return "; ".join([str(len(items)), *places[:SHOWN_PLACES], *more])


def without_heldout(items: Sequence[Item], task: str, split: str, say: Callable[[str], None], seed: int = 0) -> tuple[list[Item], int]:
    """Remove the questions of `sbtiny eval` and of cached public test sets; returns (items, how many were removed).

    A hub set that cannot be loaded is reported and skipped.
    """
    allowed = list(items)
    for name, part in heldout_splits(task, split):
        try:
            heldout = load_questions(name, part, None, seed)
        except InputError as error:
            if name not in HUB_TASKS:
                raise
            say(f"not compared with the evaluation questions of {name}: {error}")
        else:
            allowed = split_heldout(allowed, heldout, name, say)
    return allowed, len(items) - len(allowed)


def heldout_splits(task: str, split: str) -> list[tuple[str, str]]:
    """List (task, split) that training must avoid: the configured evaluation, unless it is a train split, and cached public test sets."""
    from sbtiny.tasks import hub

    own = [(task, split)] if split != "train" or task not in TASKS else []  # a file is used whole, whatever the split
    return own + [(name, "test") for name in HUB_TASKS if (name, "test") not in own and hub.is_cached(name, "test")]


def drop_eval_questions(items: list[Item], source: str, settings: Settings) -> tuple[list[Item], int]:
    """Remove evaluation questions; returns (items, how many were removed). The splits of the generated task are disjoint already."""
    e = settings.eval
    if source == e.task == "arithmetic":
        return items, 0
    return without_heldout(items, e.task, e.split, lambda message: console.print(message, markup=False, style="yellow"), settings.seed)
