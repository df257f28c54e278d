"""Where a calibration lies, and whether it fits what answers now. Chat, server and evaluation read it here."""

from pathlib import Path

from sbtiny import runs
from sbtiny.budget.calibration import Calibration
from sbtiny.budget.calibration_record import from_record
from sbtiny.errors import InputError
from sbtiny.models.aliases import resolve
from sbtiny.models.fingerprint import file_fingerprint, policy_fingerprint
from sbtiny.rollout.load_policy import base_info
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import TASKS

NAME = "calibration.json"


def calibration_path(name: str) -> Path:
    """The file of a run (in its folder), of `x.gguf` (`x.calibration.json` beside it) or of a model (in runs/calibrate-NAME)."""
    if run := runs.find_run(name):
        return run / NAME
    if name.endswith(".gguf"):
        return Path(name).with_suffix(f".{NAME}")
    return runs.ROOT / f"calibrate-{Path(name).name}" / NAME


def answering_fingerprint(policy: Policy, name: str) -> str:
    """The fingerprint of the weights that `policy`, loaded by `name`, answers with."""
    run = runs.find_run(name)
    if run is None and name.endswith(".gguf"):
        return file_fingerprint(Path(resolve(name).ref))
    info = base_info(policy)
    return policy_fingerprint(info["base"], info["four_bit"], run / "adapter" if run else None)


def load_calibration(
    policy: Policy, name: str, *, temperature: float, top_p: float, task: str | None = None, path: Path | None = None
) -> Calibration | None:
    """Read the calibration of what `policy`, loaded by `name`, answers; None where there is no file. `path`: of a file elsewhere.

    Raises InputError for a broken file, and by name for one made with other weights, format, sampling or task. `task` None, of free
    questions, is not compared; one file of questions may calibrate another.
    """
    path = path or calibration_path(name)
    if not path.is_file():
        return None
    found = from_record(runs.read_json(path), str(path))
    same_kind = task is None or (task not in TASKS and found.task not in TASKS)
    try:
        found.check_matches(
            model_fingerprint=answering_fingerprint(policy, name),
            format=policy.form.name,
            temperature=temperature,
            top_p=top_p,
            task=None if same_kind else task,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return found
