"""`sbtiny calibrate`: one sampled answer to each held-out question, and what its stated budget is worth."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.budget.calibration import CalibrationAnswer, calibrate
from sbtiny.budget.calibration_record import to_record
from sbtiny.config import EvalSettings, Settings
from sbtiny.evaluation.calibration_file import answering_fingerprint, calibration_path
from sbtiny.evaluation.evaluate import sample_with_progress
from sbtiny.evaluation.trained_questions import check_split, without_known_questions
from sbtiny.models.prompt import check_texts
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import Question


def output_path(name: str, output: Path | None) -> Path:
    """The file to write: where `load_calibration` looks, or in the folder `output`."""
    path = calibration_path(name)
    return output / path.name if output else path


def run_calibration(
    name: str, settings: Settings, confidence: float | None, output: Path | None = None, run: Path | None = None
) -> dict[str, Any]:
    """Calibrate a run, a model or a .gguf file on `eval.split` of `eval.task`; write and return the content of calibration.json.

    `run`: the run that a .gguf file was exported from, whose training questions are left out. Raises InputError for questions that are
    not for calibration, or where another process writes there.
    """
    path, e = output_path(name, output), settings.eval
    check_split(e.task, e.split)
    with runs.claim("calibrate", path.parent):
        questions = load_questions(e.task, e.split, e.limit, settings.seed)
        questions = without_known_questions(questions, e.task, run or runs.find_run(name) or exported_run(name))
        policy = load_policy(name, settings, e.max_num_seqs)
        policy.engine.check_room(e.max_tokens)
        check_texts(policy.tokenizer, questions)
        answers = [to_answer(episode) for episode in sample_answers(policy, questions, settings, f"calibrating {Path(name).name}")]
        about = {"model_fingerprint": answering_fingerprint(policy, name), "format": policy.form.name} | describe_questions(e)
        record = to_record(calibrate(answers, confidence, **about))
        runs.write_json(path, record)
    return record


def exported_run(name: str) -> Path | None:
    """The run that a .gguf file was exported from, by the export.json beside it; None where it is not known."""
    about = Path(name).with_name("export.json")
    if not (name.endswith(".gguf") and about.is_file()):
        return None
    return runs.find_run(str(runs.read_json(about).get("run", "")))


def describe_questions(e: EvalSettings) -> dict[str, Any]:
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"task": e.task, "split": e.split, "temperature": float(e.temperature), "top_p": float(e.top_p), "date": date}


def sample_answers(policy: Policy, questions: list[Question], settings: Settings, title: str) -> list[Episode]:
    """Sample one answer to each question, with the budget left to the model and no limit but `eval.max_tokens`."""
    e = settings.eval
    requests = [policy.request(q.question, e.max_tokens, settings.seed * 1_000_003 + i, system=q.system) for i, q in enumerate(questions)]
    return sample_with_progress(policy, requests, Sampling(e.temperature, e.top_p), title)


def to_answer(episode: Episode) -> CalibrationAnswer:
    whole = episode.ended and episode.parsed.ok
    return CalibrationAnswer(episode.predicted, episode.length if whole else None, cut=not episode.ended)


def calibration_settings(settings: Settings) -> Settings:
    """The settings with the budget left to the model and no cut: calibration measures answers that end by themselves."""
    return replace(settings, eval=replace(settings.eval, budget="auto", cut_at=0.0, ceiling=0))
