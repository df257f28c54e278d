"""`sbtiny demo`: base, cold start and GRPO of the bundled model, each evaluated on the same questions, a calibration, the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.coldstart.run import run_sft
from sbtiny.config import Settings
from sbtiny.evaluation.calibrate import run_calibration
from sbtiny.evaluation.run import run_eval
from sbtiny.evaluation.write_report import write_report
from sbtiny.grpo.run import run_grpo
from sbtiny.models.load import read_base


def run_demo(settings: Settings, folder: Path) -> dict[str, Any]:
    """Run all stages into `folder`; return the content of report.json. Raises InputError if another process uses the folder."""
    read_base(settings.model)  # raises before an earlier demo is archived
    with runs.claim("demo", folder):
        runs.archive_run(folder)
        return run_stages(settings, folder)


def run_stages(settings: Settings, folder: Path) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - started, 1)

    with timed("eval_base"):
        run_eval(settings.model, settings, folder / "base")
    with timed("sft"):
        start = run_sft(settings, folder / "sft")
    with timed("eval_sft"):
        run_eval(str(start), settings, start)
    with timed("grpo"):
        run_grpo(settings, start, folder, force=True)
    with timed("calibrate"):
        run_calibration(str(folder), replace(settings, eval=replace(settings.eval, split="val")), None)
    with timed("eval_grpo"):
        run_eval(str(folder), settings, folder, sweep=True)
    return write_report(folder, seconds)
