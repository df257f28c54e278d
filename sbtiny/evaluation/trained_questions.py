"""Keep the questions of a calibration apart from those of training and evaluation: a promise measured on them would be too good."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError
from sbtiny.evaluation.report import read_settings
from sbtiny.tasks.leaks import leave_out, warn, without_eval_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import TASKS, Question, read_rows


def check_split(task: str, split: str) -> None:
    """Raise InputError for a split that is not for calibration."""
    if split == "test":
        raise InputError("--split test is for eval: a promise measured on it could not be checked; calibrate on val or on a file (--task)")
    if split == "train" and task in TASKS:
        raise InputError(f"--split train of {task} is for training: calibrate on val or on a file (--task)")


def load_calibration_questions(e: EvalSettings, seed: int, run: Path | None) -> list[Question]:
    """Load `eval.limit` questions that neither the run's training nor its evaluation knows. Raises InputError where there are none."""
    return without_known_questions(load_questions(e.task, e.split, e.limit, seed), e.task, run)


def without_known_questions(questions: list[Question], task: str, run: Path | None) -> list[Question]:
    """Remove the questions that the run and its parents were trained on, and those of its configured evaluation and of public test sets.

    The splits of a named task are disjoint already. Raises InputError when nothing is left; says what is removed and what is not known.
    """
    for folder in lineage(run) if run else ():
        for source, trained in training_of(folder, task):
            questions = leave_out(questions, trained, f"in the training of {source}", f"questions that {source} was trained on")
    evaluation = (read_settings(run / "config.yaml").get("eval") if run else None) or {}
    evaluated, split = evaluation.get("task", "arithmetic"), evaluation.get("split", "test")
    return questions if evaluated == task and task in TASKS else without_eval_questions(questions, evaluated, split)


def lineage(run: Path) -> Iterator[Path]:
    """The run, those it was trained on from, and theirs; each once. An average has the `parents` that it lies between."""
    waiting, seen = [run], set()
    while waiting:
        folder = waiting.pop(0)
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        yield folder
        about = runs.read_run(folder)
        for parent in about.get("parents") or filter(None, [about.get("parent")]):
            if place := next((place for place in (Path(parent), folder / "sft") if (place / "run.json").is_file()), None):
                waiting.append(place)
            else:
                warn(f"not compared with the training of {parent}: it is not there")


def training_of(folder: Path, task: str) -> Iterator[tuple[str, list[Any]]]:
    """What one run was trained on: the source and its questions, of the rows of a cold start or of GRPO."""
    about, config = runs.read_run(folder), read_settings(folder / "config.yaml")
    if about.get("parents"):  # an average was itself trained on nothing
        return
    kind = about["kind"]
    section = config.get(kind) or {}
    if kind == "sft":
        file = Path(section.get("rows") or folder / "data.jsonl")
        if file.is_file():
            yield str(file), [Question("", row["question"], "") for row in read_rows(str(file)) if isinstance(row.get("question"), str)]
        else:
            warn(f"not compared with the rows of {folder}: {file} is not there")
        return
    source = section.get("questions") or section.get("task", "arithmetic")
    if source == task and task in TASKS:
        return
    try:
        yield source, load_questions(source, "train", section.get("limit"), config.get("seed", 0) + 1)
    except InputError as error:
        warn(f"not compared with the questions of {folder}: {error}")
