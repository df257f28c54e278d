"""`sbtiny export --calibrate`: a calibration of each GGUF file of an export, with the file's own answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sbtiny.config import Settings
from sbtiny.evaluation.calibrate import run_calibration
from sbtiny.evaluation.calibration_file import calibration_path
from sbtiny.evaluation.trained_questions import load_calibration_questions
from sbtiny.export.config import ExportConfig
from sbtiny.progress import console, print_line
from sbtiny.rollout.engines import llama_cpp

QUESTIONS = 500


def calibration_settings(plan: ExportConfig) -> Settings:
    return replace(plan.settings, engine="ours", eval=replace(plan.settings.eval, split="val", limit=QUESTIONS))


def check_questions(plan: ExportConfig) -> None:
    """Raise InputError where there are no questions to calibrate on; call it before the work of an export."""
    settings = calibration_settings(plan)
    load_calibration_questions(settings.eval, settings.seed, plan.run)


def calibrate_files(plan: ExportConfig, folder: Path) -> dict[str, Any]:
    """Write `x.calibration.json` beside each x.gguf of a finished export; return their factors by file name.

    Asks QUESTIONS of the val split. Without llama-cpp-python it says so in one line and writes nothing.
    """
    files = [folder / f"{plan.name}-{kind}.gguf" for kind in plan.kinds]
    if not files or not llama_cpp.is_available():
        why = "pip install 'sbtiny[llama]', then sbtiny calibrate x.gguf" if files else "there is no GGUF file (--gguf)"
        console.print(f"not calibrated: {why}", style="yellow", soft_wrap=True, markup=False)
        return {}
    settings = calibration_settings(plan)
    found = {}
    for file in files:
        record = run_calibration(str(file), settings, None, run=plan.run)
        print_line(f"wrote {calibration_path(str(file))}")
        found[file.name] = record["factors"]
    return found
