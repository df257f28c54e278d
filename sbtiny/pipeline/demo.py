"""`sbtiny demo`: base, cold start and GRPO of the bundled model, each evaluated on the same held-out questions, and the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.config import Settings
from sbtiny.evaluation import report
from sbtiny.models.load import read_base
from sbtiny.pipeline.stages import run_eval, run_grpo, run_sft


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """The content of report.json. Raises InputError where another process has the folder."""
    read_base(settings.model)  # what is there of an earlier demo stays until this one can begin
    with runs.claim("demo", folder):
        runs.set_aside(folder)
        return pipeline(settings, folder)


def pipeline(settings: Settings, folder: Path) -> dict[str, Any]:
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
    with timed("eval_grpo"):
        run_eval(str(folder), settings, folder, sweep=True)
    return report.write(folder, seconds)
