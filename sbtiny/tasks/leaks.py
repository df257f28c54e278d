"""Keep evaluation questions out of training: a question is the same where its words and numbers are."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from sbtiny.errors import InputError
from sbtiny.tasks.sources import HUB_TASKS, TASKS, load_questions


class Asked(Protocol):
    """What has a question, and the place it was read from: Question, Trace, Labelled."""

    question: str
    where: str


Item = TypeVar("Item", bound=Asked)
SHOWN = 5  # places that are told


def fingerprint(question: str) -> str:
    """A hash of the words and numbers alone: case, white space, punctuation and the form of letters are nothing."""
    plain = unicodedata.normalize("NFKC", question).casefold()
    words = re.findall(r"\w+(?:[.,]\d+)*|[-+*/^=<>]", plain)
    return blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


def apart(items: Sequence[Item], heldout: Iterable[Asked], of: str, say: Callable[[str], None]) -> list[Item]:
    """The items whose question is none of `heldout`; the others are told. Raises InputError when nothing is left."""
    kept_out = {fingerprint(item.question) for item in heldout}
    kept, left = [], []
    for item in items:
        (left if fingerprint(item.question) in kept_out else kept).append(item)
    if items and not kept:
        first = f" (the first: {items[0].where})" if items[0].where else ""
        raise InputError(f"every question is an evaluation question of {of}{first}: train on others")
    if left:
        places = [item.where for item in left if item.where]
        more = ["..."] if len(places) > SHOWN else []
        say(f"evaluation questions of {of} left out: {'; '.join([str(len(left)), *places[:SHOWN], *more])}")
    return kept


def without_heldout(
    items: Sequence[Item], task: str, split: str, say: Callable[[str], None], seed: int = 0
) -> tuple[list[Item], int]:
    """`apart` from all that `sbtiny eval` would ask, and from the test splits of named sets that are on this machine.

    Also returns how many were left out. A hub's set that is not at hand is told and not compared.
    """
    kept = list(items)
    for name, part in evaluations(task, split):
        try:
            heldout = load_questions(name, part, None, seed)
        except InputError as error:
            if name not in HUB_TASKS:
                raise
            say(f"not compared with the evaluation questions of {name}: {error}")
        else:
            kept = apart(kept, heldout, name, say)
    return kept, len(items) - len(kept)


def evaluations(task: str, split: str) -> list[tuple[str, str]]:
    """(task, split) of the evaluation that is set, unless it asks training questions on purpose, and of the sets that others compare on."""
    from sbtiny.tasks import hub

    own = [(task, split)] if split != "train" or task not in TASKS else []  # a file is used whole, whatever the split
    return own + [(name, "test") for name in HUB_TASKS if (name, "test") not in own and hub.at_hand(name, "test")]
