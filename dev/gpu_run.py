"""What waits for a GPU (docs/gpu-unverified.md), in stages of at most eight minutes that resume: one line of JSON a figure.

    python dev/gpu_run.py FOLDER [STAGE ...] [--model FILE.gguf --questions train.jsonl --test test.jsonl]

A stage is a row of steps (gpu_stages.py). The figures of a step are printed and appended to FOLDER/figures.jsonl as soon as it ends. Killed
or out of time, the same command goes on: steps that ended are left out, a training goes on from its checkpoint. Where there is no GPU, or
with --small, the bundled model and small shapes take the place of real ones.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "triton", "unsloth", "vllm")
GRACE = 20  # seconds that a command has to leave after Ctrl-C
LAST_WORDS = 600  # characters of a failed command that its figure keeps
Figure = tuple[str, Any, str]  # name, value, unit
Step = Callable[["Place"], Iterator[Figure]]


class OutOfTime(Exception):
    """The minutes of a stage are over."""


class StepFailed(Exception):
    """A command of a step ended with another code than 0; the text is its last words."""


class Skipped(Exception):
    """A step cannot be run here; the text says why."""


def die_with_parent() -> None:
    """Let the system kill this child when its parent is killed: else it would hold the lock of a run that is gone on with."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Place:
    """Where and how the steps run. `deadline`: of the present stage, on time.monotonic's clock. `log`: of the present step's commands."""

    folder: Path
    on_gpu: bool
    small: bool
    model: str | None = None
    questions: str | None = None
    test: str | None = None
    deadline: float = 0.0
    log: Path = field(default_factory=Path)

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start a command of this Python's (`-m sbtiny ...`, or a script), with its stderr in the log."""
        hidden = {} if self.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        words = [sys.executable, *map(str, command)]
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            return subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.folder,
                env=os.environ | hidden | {"PYTHONPATH": path} | environment,
                preexec_fn=die_with_parent,
            )

    def run(self, *command: str | Path, **environment: str) -> str:
        """What a command prints. Raises StepFailed, and OutOfTime at the deadline, when it is interrupted as by Ctrl-C."""
        child = self.start(*command, **environment)
        try:
            said, _ = child.communicate(timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(child)
            raise OutOfTime from None
        with self.log.open("a", encoding="utf-8") as log:
            log.write(said)
        if child.returncode:
            self.fail(child.returncode)
        return said

    def fail(self, code: int) -> NoReturn:
        raise StepFailed(f"code {code}: {self.log.read_text(encoding='utf-8', errors='replace')[-LAST_WORDS:]}")

    def read(self, *command: str | Path, **environment: str) -> Any:
        """The JSON of a command's last line."""
        return json.loads(self.run(*command, **environment).strip().splitlines()[-1])

    def sbtiny(self, *arguments: str | Path) -> Any:
        return self.read("-m", "sbtiny", *arguments, "--json")


def stop(child: subprocess.Popen[str]) -> None:
    """Interrupt a command so that a training leaves only whole checkpoints; kill it when it does not leave."""
    child.send_signal(signal.SIGINT)
    try:
        child.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def describe(on_gpu: bool) -> dict[str, Any]:
    """Card and versions, without importing torch: its context would take memory of the card that is measured."""
    from sbtiny.models.device import probe_device

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"card": probe_device().name if on_gpu else f"cpu ({os.cpu_count()} cores)", "versions": versions}


class Figures:
    """FOLDER/figures.jsonl. The last figure of a step is its seconds; a step without it has not ended."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.file, self.about = folder / "figures.jsonl", about
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the process was killed in the middle of a line
            self.file.write_text(whole, encoding="utf-8")
        self.rows = [json.loads(line) for line in whole.splitlines()]

    def has(self, stage: str, step: str) -> bool:
        return any((row["stage"], row["step"], row["name"]) == (stage, step, "seconds") for row in self.rows)

    def add(self, stage: str, step: str, figures: list[Figure]) -> None:
        """Print the figures of a step and append them, in one write."""
        rows = [{"stage": stage, "step": step, "name": n, "value": v, "unit": unit} | self.about for n, v, unit in figures]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        print(lines, end="", flush=True)
        self.rows += rows


def run_step(name: str, stage: str, step: Step, place: Place, figures: Figures) -> str | None:
    """Run a step that has not ended, and write its figures. Returns why it is not done, None when it is."""
    place.log = place.folder / "logs" / f"{stage}-{name}.log"
    started = time.monotonic()
    try:
        found = list(step(place))
    except Skipped as reason:
        print(f"{stage} {name}: left out, {reason}", file=sys.stderr, flush=True)
        return None
    except OutOfTime:
        return "out of time"
    except StepFailed as error:
        figures.add(stage, name, [("failed", str(error), "")])
        return f"failed, see {place.log}"
    figures.add(stage, name, [*found, ("seconds", round(time.monotonic() - started, 1), "s")])
    return None


def run_stages(stages: dict[str, dict[str, Step]], place: Place, figures: Figures, minutes: float) -> list[str]:
    """Run what has not ended. A step that fails ends its stage, because the next ones need it. Returns what is not done."""
    left = []
    for stage, steps in stages.items():
        place.deadline = time.monotonic() + 60 * minutes
        for name, step in steps.items():
            if figures.has(stage, name):
                continue
            if reason := run_step(name, stage, step, place, figures):
                left.append(f"{stage} {name}: {reason}")
                break
    return left


def main() -> None:
    from gpu_stages import make_stages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: what is here")
    parser.add_argument("--small", action="store_true", help="small shapes and the bundled model, as without a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="the longest a stage may take in one call")
    parser.add_argument("--model", help="a real model, folder or .gguf file, for the stage `real`")
    parser.add_argument("--questions", help="its training questions (JSONL)")
    parser.add_argument("--test", help="its test questions (JSONL)")
    args = parser.parse_args()
    from sbtiny.models.device import probe_device

    on_gpu = args.device != "cpu" and probe_device().device == "cuda"
    if args.device == "cuda" and not on_gpu:
        parser.error("no GPU answers nvidia-smi here: leave --device out")
    paths = {name: str(Path(value).absolute()) if (value := getattr(args, name)) else None for name in ("model", "questions", "test")}
    place = Place(args.folder.absolute(), on_gpu, args.small or not on_gpu, **paths)
    stages = make_stages(place)
    if unknown := [name for name in args.stages if name not in stages]:
        parser.error(f"no stage {unknown[0]!r}: choose from {', '.join(stages)}")
    (place.folder / "logs").mkdir(parents=True, exist_ok=True)
    figures = Figures(place.folder, describe(on_gpu))
    left = run_stages({name: stages[name] for name in args.stages or stages}, place, figures, args.minutes)
    if left:
        sys.exit("not done, the same command goes on:\n  " + "\n  ".join(left))


if __name__ == "__main__":
    import gpu_run  # by the name by which the stages know it: else their Skipped would be another one than ours

    gpu_run.main()
