"""The coverage of eval.json: how often answers kept the promise of the calibration."""

from collections.abc import Sequence
from typing import Any

from sbtiny.budget.calibration import CalibrationAnswer
from sbtiny.budget.coverage import kept_coverage
from sbtiny.budget.metrics import Sample
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError
from sbtiny.evaluation.calibration_file import load_calibration
from sbtiny.progress import console
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import TASKS


def measure_coverage(policy: Policy, name: str, settings: EvalSettings, samples: Sequence[Sample]) -> dict[str, Any]:
    """Compute {"coverage": ...} for eval.json, empty where the model is not calibrated.

    A calibration that does not fit is named on stderr and not used: the rest of the evaluation does not need it.
    """
    if settings.budget != "auto" or settings.cut_at or settings.ceiling:
        return {}  # the promise is of answers that state their own budget and end by themselves
    try:
        found = load_calibration(policy, name, temperature=settings.temperature, top_p=settings.top_p, task=settings.task)
        if found and found.task == settings.task and (found.split == settings.split or found.task not in TASKS):  # a file has no splits
            where = f"{found.task}, split {found.split}" if found.task in TASKS else found.task
            raise InputError(f"the calibration is on {where}, as this evaluation: evaluate on other questions")
    except InputError as error:
        console.print(f"no coverage: {error}", markup=False, style="yellow", soft_wrap=True)
        return {}
    if found is None:
        return {}
    answers = [CalibrationAnswer(s.budget, s.length if s.ok else None) for s in samples]
    return {"coverage": kept_coverage(found, answers)}
