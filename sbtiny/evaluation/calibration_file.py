"""Where a calibration lies, whether it fits what answers now, and how its promises were kept. Chat, server and evaluation read it here."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.budget.calibration import Calibration, CalibrationAnswer
from sbtiny.budget.calibration_record import from_record
from sbtiny.budget.metrics import Sample
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError
from sbtiny.models.aliases import resolve
from sbtiny.models.fingerprint import file_fingerprint, policy_fingerprint
from sbtiny.progress import console
from sbtiny.rollout.load_policy import base_info
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import TASKS, locate_sample

NAME, UPSTREAM_NAME = "calibration.json", "upstream.calibration.json"
NAMED_BY = ("model_fingerprint", "date", "task", "split", "questions", "confidence")  # what tells two calibrations apart


def calibration_path(name: str, output: Path | None = None, is_upstream: bool = False) -> Path:
    """The file of a run (in its folder), of `x.gguf` (`x.calibration.json` beside it) or of a model (in runs/calibrate-NAME).

    `output`: the folder to have it in instead. `is_upstream`: servers elsewhere answer, which have a calibration of their own.
    """
    file = UPSTREAM_NAME if is_upstream else NAME
    if run := runs.find_run(name):
        path = run / file
    elif name.endswith(".gguf"):
        path = Path(name).with_suffix(f".{file}")
    else:
        path = runs.ROOT / f"calibrate-{Path(name).name}" / file
    return output / path.name if output else path


def answering_fingerprint(policy: Policy, name: str) -> str:
    """The fingerprint of the weights that `policy`, loaded by `name`, answers with; an upstream's are known by name alone."""
    if policy.engine.fingerprint:
        return policy.engine.fingerprint
    run = runs.find_run(name)
    if run is None and name.endswith(".gguf"):
        return file_fingerprint(Path(resolve(name).ref))
    info = base_info(policy)
    return policy_fingerprint(info["base"], info["four_bit"], run / "adapter" if run else None)


def read_calibration(path: Path) -> Calibration | None:
    """Read a calibration's file; None where there is none. Raises InputError for a broken one."""
    return from_record(runs.read_json(path), str(path)) if path.is_file() else None


def load_calibration(
    policy: Policy, name: str, *, temperature: float | None = None, top_p: float | None = None, task: str | None = None
) -> Calibration | None:
    """Read the calibration of what `policy`, loaded by `name`, answers; None where there is no file.

    Raises InputError for a broken file, and by name for one made with other weights, format, prompt, sampling or task. What is None is not
    compared: the task of free questions, the sampling where each answer has its own. One file of questions may calibrate another.
    """
    path = calibration_path(name, is_upstream=bool(policy.engine.servers))
    found = read_calibration(path)
    if found is None:
        return None
    same_kind = task is None or (task not in TASKS and found.task not in TASKS)
    asked = {"temperature": temperature, "top_p": top_p, "task": None if same_kind else task}
    asked = {key: value for key, value in asked.items() if value is not None}
    asked |= {"format": policy.form.name, "prompt": asdict(policy.asked_with)}
    found.check_matches(str(path), model_fingerprint=answering_fingerprint(policy, name), **asked)
    return found


def measure_coverage(policy: Policy, name: str, settings: EvalSettings, samples: Sequence[Sample]) -> dict[str, Any]:
    """Compute {"coverage": ..., "calibration": which one} for eval.json, empty where the model is not calibrated.

    A calibration that does not fit is named on stderr and not used: the rest of the evaluation does not need it.
    """
    if settings.budget != "auto" or settings.cut_at or settings.ceiling:
        return {}  # the promise is of answers that state their own budget and end by themselves
    try:
        found = load_calibration(policy, name, temperature=settings.temperature, top_p=settings.top_p, task=settings.task)
        if found and asks_the_same(found, settings):
            where = f"{found.task}, split {found.split}" if found.task in TASKS else found.task
            raise InputError(f"the calibration is on {where}, as this evaluation: evaluate on other questions")
    except InputError as error:
        console.print(f"no coverage: {error}", markup=False, style="yellow", soft_wrap=True)
        return {}
    answers = [CalibrationAnswer(s.budget, s.length if s.ok else None) for s in samples]
    if found is None:
        return {}
    return {"coverage": found.kept_coverage(answers), "calibration": {key: getattr(found, key) for key in NAMED_BY}}


def asks_the_same(found: Calibration, settings: EvalSettings) -> bool:
    """Whether an evaluation asks what was calibrated on: the split of a named task, or a file, whatever its path is called or its `#N`."""
    if {found.task, settings.task} & set(TASKS):
        return (found.task, found.split) == (settings.task, settings.split)
    return locate_sample(found.task)[0].resolve() == locate_sample(settings.task)[0].resolve()
