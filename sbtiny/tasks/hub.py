"""Named data sets of the Hugging Face hub, read with `datasets`, at a fixed revision where one is known."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sbtiny.errors import InputError
from sbtiny.tasks.answers import marked_answer
from sbtiny.tasks.sources import HUB_TASKS, Question, Row, parse_question

VAL_EVERY = 20  # every twentieth row of a hub train split is in the val split
MAX_ANSWER_CHARS = 200  # a longer reference is a whole solution, which no verifier can check


@dataclass(frozen=True, slots=True)
class Hub:
    """A dataset of the hub, its splits, and its names for our keys. `revision` None is the newest."""

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


def load_hub_questions(task: str, split: str) -> list[Question]:
    """Load all questions of a split. Raises InputError for a missing split, no usable row, or a failed download."""
    questions = to_questions(task, read_hub_rows(task, split), split)
    if not questions:
        raise InputError(f"{HUBS[task].path} has no row whose answer can be checked: give another --task")
    return questions


def is_cached(task: str, split: str) -> bool:
    """Whether the split is in the local cache, so that it loads without a network."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = HUBS[task].path.rpartition("/")
    cache = Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"  # as `datasets` names it
    return split in HUBS[task].splits and cache.is_dir()


def read_hub_rows(task: str, split: str) -> Iterable[Row]:
    """Load all rows of the hub split that contains ours. Raises InputError for a missing split or a failed download."""
    hub, wanted = HUBS[task], "test" if split == "test" else "train"
    if wanted not in hub.splits:
        other = ", ".join(name for name in HUB_TASKS if wanted in HUBS[name].splits)
        use = "to evaluate on" if wanted == "test" else "to train on"
        raise InputError(f"{task} has no questions {use}: take {other}, or a JSON Lines file")
    from datasets import load_dataset

    try:
        return load_dataset(hub.path, hub.name, split=wanted, revision=hub.revision)
    except (OSError, ValueError) as error:  # no connection and no cached copy, or a changed dataset
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        hint = "go online, or give a JSON Lines file of questions instead"
        raise InputError(f"cannot get {hub.path} from the hub ({reason}): {hint}") from error


def to_questions(task: str, rows: Iterable[Row], split: str) -> list[Question]:
    """Convert hub rows to questions. Every twentieth row of the hub's train split is in val and not in train.

    A whole solution is replaced by its marked answer; a row without one is left out.
    """
    hub, questions = HUBS[task], []
    for index, row in enumerate(rows):
        if split != "test" and (split == "val") != (index % VAL_EVERY == 0):
            continue
        where, name = f"{hub.path}, row {index}", f"{task}-{'test' if split == 'test' else 'train'}-{index:05d}"
        if hub.answer not in row or hub.question not in row:
            raise InputError(f"{where} has no {hub.question!r} and {hub.answer!r}: the set has changed; give a JSON Lines file")
        answer = str(row[hub.answer] or "")
        if "####" not in answer and len(answer) > MAX_ANSWER_CHARS:
            answer = marked_answer(answer) or ""
        if answer.strip(" $") and len(answer.rpartition("####")[2]) <= MAX_ANSWER_CHARS:
            renamed = row | {"id": name, "question": row[hub.question], "answer": answer.strip(" $"), "source": task}
            questions.append(parse_question(renamed, where, name))
    return questions
