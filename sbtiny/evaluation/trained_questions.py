"""Keep the questions of a calibration apart from those of training and evaluation: a promise measured on them would be too good."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.errors import InputError
from sbtiny.load_settings import parse_yaml
from sbtiny.tasks.leaks import leave_out, warn, without_eval_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import TASKS, Question, read_rows


class TrainedRow:
    """The question of a labelled row."""

    def __init__(self, question: str) -> None:
        self.question, self.where = question, ""


def check_split(task: str, split: str) -> None:
    """Raise InputError for a split that is not for calibration."""
    if split == "test":
        raise InputError("--split test is for eval: a promise measured on it could not be checked; calibrate on val or on a file (--task)")
    if split == "train" and task in TASKS:
        raise InputError(f"--split train of {task} is for training: calibrate on val or on a file (--task)")


def without_known_questions(questions: list[Question], task: str, run: Path | None) -> list[Question]:
    """Remove the questions that the run and its parents were trained on, and those of its configured evaluation and of public test sets.

    The splits of a named task are disjoint already. Raises InputError when nothing is left; says what is removed and what is not known.
    """
    for folder in lineage(run) if run else ():
        for of, trained in training_of(folder, read_config(folder), task):
            questions = leave_out(questions, trained, f"in the training of {of}", f"questions that {of} was trained on")
    section = (read_config(run).get("eval") if run else None) or {}
    evaluated, split = section.get("task", "arithmetic"), section.get("split", "test")
    if evaluated == task and task in TASKS:
        return questions
    return without_eval_questions(questions, evaluated, split)


def lineage(run: Path) -> Iterator[Path]:
    """The run, its cold start, and theirs; each once."""
    seen: set[Path] = set()
    waiting = [run]
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        yield folder
        if parent := runs.read_run(folder).get("parent"):
            moved = [place for place in (Path(parent), folder / "sft") if (place / "run.json").is_file()]
            waiting += moved[:1]
            if not moved:
                warn(f"not compared with the training of {parent}: it is not there")


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    return parse_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}


def training_of(folder: Path, config: dict[str, Any], task: str) -> Iterator[tuple[str, list[Any]]]:
    """The questions that one run was trained on, with their source: the rows of a cold start, the questions of GRPO."""
    if runs.read_run(folder)["kind"] == "sft":
        section = config.get("sft") or {}
        file = Path(section.get("rows") or section.get("data") or folder / "data.jsonl")  # `data` was its name before 0.1
        if file.is_file():
            yield str(file), [TrainedRow(row["question"]) for row in read_rows(str(file)) if isinstance(row.get("question"), str)]
        else:
            warn(f"not compared with the rows of {folder}: {file} is not there")
        return
    section = config.get("grpo") or {}
    source = section.get("questions") or section.get("data") or section.get("task", "arithmetic")
    if source == task and task in TASKS:
        return
    try:
        yield source, load_questions(source, "train", section.get("limit"), config.get("seed", 0) + 1)
    except InputError as error:
        warn(f"not compared with the questions of {folder}: {error}")
