"""`sbtiny calibrate`: one sampled answer to each held-out question, and what its stated budget is worth."""

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.budget.calibration import CalibrationAnswer, calibrate
from sbtiny.budget.calibration_record import to_record
from sbtiny.config import EvalSettings, Settings
from sbtiny.errors import InputError
from sbtiny.evaluation.calibration_file import answering_fingerprint, calibration_path, read_calibration
from sbtiny.evaluation.evaluate import sample_with_progress, with_max_tokens, with_seeds
from sbtiny.evaluation.trained_questions import check_split, load_calibration_questions
from sbtiny.models.prompt import check_texts
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.leaks import warn
from sbtiny.tasks.sources import Question


def run_calibration(
    name: str, settings: Settings, confidence: float | None, output: Path | None = None, run: Path | None = None
) -> dict[str, Any]:
    """Calibrate a run, a model or a .gguf file on `eval.split` of `eval.task`; write and return the content of calibration.json.

    `run`: the run that a .gguf file was exported from, whose training questions are left out. The model states its budgets and nothing
    is cut, whatever the settings. Raises InputError for questions that are not for calibration, or where another process writes there.
    """
    path, e = calibration_path(name, output, bool(settings.upstream)), settings.eval
    check_split(e.task, e.split)
    with runs.claim("calibrate", path.parent):
        questions = load_calibration_questions(e, settings.seed, run or runs.find_run(name) or exported_run(name))
        policy = load_policy(name, settings, e.max_num_seqs)
        check_texts(policy.tokenizer, questions)
        e = with_max_tokens(policy, questions, e, settings.seed)
        policy.engine.check_room(e.max_tokens)
        found = calibrate(
            sample_answers(policy, questions, e, settings.seed, f"calibrating {Path(name).name}"),
            confidence,
            model_fingerprint=answering_fingerprint(policy, name),
            format=policy.form.name,
            prompt=asdict(policy.asked_with),
            task=e.task,
            split=e.split,
            temperature=float(e.temperature),
            top_p=float(e.top_p),
            date=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        record = to_record(found)
        keep_larger(path, found.questions)
        runs.write_json(path, record)
    return record


def keep_larger(path: Path, questions: int) -> None:
    """Copy the calibration that is there, where it is of more questions, to `<name>-before-<time>`: a try on five must not cost it."""
    earlier = None
    with suppress(InputError):  # a broken one is replaced
        earlier = read_calibration(path)
    if earlier and earlier.questions > questions:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        kept = path.with_name(f"{path.stem}-before-{stamp}{path.suffix}")
        runs.write_bytes(kept, path.read_bytes())
        warn(f"the calibration before, of {earlier.questions} questions and not {questions}, is kept as {kept}: rename it to use it again")


def exported_run(name: str) -> Path | None:
    """The run that a .gguf file or a merged folder was exported from, by the export.json beside it; None where it is not known.

    The run that the export lies in goes first, since it may have another name by now; then the folders above, since the present one may
    hold another run of this name. Says what is not found.
    """
    model = Path(name).absolute()
    about = model.parent / "export.json"
    if not (name.endswith(".gguf") or model.name == "merged") or not about.is_file():
        return None
    named = str(runs.read_json(about).get("run"))
    places = (model.parent.parent, *(folder / named for folder in about.parents), named)
    run = next(filter(None, (runs.find_run(str(place)) for place in places)), None)
    if run is None:
        warn(f"not compared with the training of {named}, which {about} names: it is not there; calibrate in the folder that it is in")
    return run


def sample_answers(policy: Policy, questions: list[Question], e: EvalSettings, seed: int, title: str) -> list[CalibrationAnswer]:
    """Sample one answer to each question, with the budget left to the model and no limit but `eval.max_tokens`."""
    requests = [policy.request(q.question, e.max_tokens, own, system=q.system) for q, own in with_seeds(questions, seed)]
    episodes = sample_with_progress(policy, requests, Sampling(e.temperature, e.top_p), title)
    return [CalibrationAnswer(x.predicted, x.length if x.ended and x.parsed.ok else None, cut=not x.ended) for x in episodes]
