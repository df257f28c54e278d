"""Named sets of questions on the Hugging Face hub, read with `datasets` at a fixed revision where one is known."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sbtiny.errors import InputError
from sbtiny.tasks.answers import given_answer
from sbtiny.tasks.sources import HUB_TASKS, Question, Row, to_question

VAL_EVERY = 20  # one row in twenty of a hub dataset's train split is the val split
LONGEST_ANSWER = 200  # characters; a reference beyond is a whole solution, which no verifier can compare with


@dataclass(frozen=True, slots=True)
class Hub:
    """A dataset of the hub, the splits it has, and its names for our keys. `revision` None is what the hub has today."""

    path: str
    name: str | None
    question: str
    answer: str
    splits: tuple[str, ...]
    revision: str | None = None


HUBS = {
    "gsm8k": Hub("openai/gsm8k", "main", "question", "answer", ("train", "test"),
                 "740312add88f781978c0658806c59bc2815b9866"),
    "math": Hub("nlile/hendrycks-MATH-benchmark", None, "problem", "answer", ("train", "test")),
    "math500": Hub("HuggingFaceH4/MATH-500", None, "problem", "answer", ("test",),
                   "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
    "aime25": Hub("math-ai/aime25", None, "problem", "answer", ("test",), "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
    "still3": Hub("RUC-AIBOX/STILL-3-Preview-RL-Data", None, "question", "answer", ("train",)),
    "s1k": Hub("simplescaling/s1K-1.1", None, "question", "solution", ("train",)),
}  # fmt: skip


def questions(task: str, split: str) -> list[Question]:
    """All questions of a split. Raises InputError where the set has none of it, and where it cannot be had."""
    found = to_questions(task, rows(task, split), split)
    if not found:
        raise InputError(f"{HUBS[task].path} has no row whose answer can be checked: give another --task")
    return found


def at_hand(task: str, split: str) -> bool:
    """Whether a set with that split was read on this machine before, and can be again without a network."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = HUBS[task].path.rpartition("/")
    kept = Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"  # as `datasets` names it
    return split in HUBS[task].splits and kept.is_dir()


def rows(task: str, split: str) -> Iterable[Row]:
    """All rows of the hub's split that holds ours. Raises InputError where the dataset cannot be had."""
    hub, wanted = HUBS[task], "test" if split == "test" else "train"
    if wanted not in hub.splits:
        other = ", ".join(name for name in HUB_TASKS if wanted in HUBS[name].splits)
        use = "to evaluate on" if wanted == "test" else "to train on"
        raise InputError(f"{task} has no questions {use}: take {other}, or a JSON Lines file")
    from datasets import load_dataset

    try:
        return load_dataset(hub.path, hub.name, split=wanted, revision=hub.revision)
    except (OSError, ValueError) as error:  # no connection and no cached copy; a dataset that changed its shape
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        mend = "go online, or give a JSON Lines file of questions in its place"
        raise InputError(f"cannot get {hub.path} from the hub ({reason}): {mend}") from error


def to_questions(task: str, found: Iterable[Row], split: str) -> list[Question]:
    """Hub rows as questions; every twentieth row of the hub's train split is our val split, and not in train.

    An answer that is a whole solution counts by the answer it gives expressly; without one the row is left out.
    """
    hub, kept = HUBS[task], []
    for index, row in enumerate(found):
        if split != "test" and (split == "val") != (index % VAL_EVERY == 0):
            continue
        where, name = f"{hub.path}, row {index}", f"{task}-{'test' if split == 'test' else 'train'}-{index:05d}"
        if hub.answer not in row or hub.question not in row:
            raise InputError(f"{where} has no {hub.question!r} and {hub.answer!r}: the set has changed; give a JSON Lines file")
        answer = str(row[hub.answer] or "")
        if "####" not in answer and len(answer) > LONGEST_ANSWER:
            answer = given_answer(answer) or ""
        if answer.strip(" $") and len(answer.rpartition("####")[2]) <= LONGEST_ANSWER:
            renamed = row | {"id": name, "question": row[hub.question], "answer": answer.strip(" $"), "source": task}
            kept.append(to_question(renamed, where, name))
    return kept
