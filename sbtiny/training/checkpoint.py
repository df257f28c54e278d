"""Checkpoints that can be trusted: whole or not there, and only gone on from with the settings they were made with.

TRL writes a checkpoint file by file. Ours comes last, under its final name by a rename: a folder without it, or without a file that it
lists, was being written, or removed, when the run was killed.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbtiny import runs
from sbtiny.config import Settings, flatten, load
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.sources import identity
from sbtiny import distributed

SEAL = "sbtiny.json"
# Change what is kept or how much is computed at a time, not what is learnt.
FREE = ("grpo.save_steps", "grpo.sample_steps", "grpo.patience", "grpo.micro_batch", "sft.save_steps", "sft.micro_batch")
ABSENT = object()
LATER = {"backend": "auto"}  # settings that older checkpoints do not name, and what they were


def mattering(settings: Settings, stage: str, data: Sequence[Any]) -> dict[str, Any]:
    """Dotted settings of a stage on which its weights depend, and a digest of its rows or questions."""
    everything = asdict(settings)
    chosen = {key: everything[key] for key in ("model", "format", "seed", "four_bit", "backend", "engine", stage)}
    found = {key: value for key, value in flatten(chosen) if key not in FREE}
    digest = blake2b(repr(identity(data)).encode(), digest_size=8).hexdigest() if data else None
    return found | {"the training data": digest}


class Sealer(TrainerCallback):
    """Ends every checkpoint with `sbtiny.json`: step, settings that matter, the files there are, and `state()`, what TRL does not keep."""

    def __init__(self, settings: dict[str, Any], state: Callable[[], dict[str, Any]] = dict) -> None:
        self.settings, self.state = settings, state

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save:
            control.should_log = True  # the loss since the last log is kept in memory alone

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        distributed.wait()  # every process has files of its own in it
        if not distributed.first():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        for name in sizes:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())  # the seal must not reach the disk before what it vouches for
        about = {"step": state.global_step, "settings": self.settings, "files": sizes, "state": self.state()}
        runs.write_json(folder / SEAL, about)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / SEAL).is_file():
        return False
    files = runs.read_json(checkpoint / SEAL)["files"].items()
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files)


def last_checkpoint(folder: Path, upto: float = math.inf) -> Path | None:
    """The newest whole checkpoint of a run, of a step up to `upto`; None when there is none. Changes nothing."""
    return max((path for path in folder.glob("checkpoint-*") if is_whole(path) and step_of(path) <= upto), key=step_of, default=None)


def tidy(folder: Path) -> None:
    """Remove what was being written: an adapter, checkpoints that are not whole."""
    for path in (folder / ".adapter.tmp", *folder.glob("checkpoint-*")):
        if path.name.startswith(".") or not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def go_on(folder: Path, settings: dict[str, Any]) -> Path | None:
    """Make an unfinished run as it was at its last whole checkpoint, and return that; None: it starts at step 0.

    Half-written checkpoints are removed, and rows of metrics.jsonl and samples.jsonl that the run will write again. Raises InputError
    for a finished run and for a setting that differs, by its name; the folder is then as it was.
    """
    if (folder / "adapter").exists():
        raise InputError(f"{folder} is finished: there is nothing to go on with; start a new run without --resume")
    if checkpoint := last_checkpoint(folder):
        check_same(runs.read_json(checkpoint / SEAL)["settings"], settings, checkpoint)
    return rewind(folder)


def rewind(folder: Path) -> Path | None:
    """The logs and checkpoints of a run cut back to its last whole checkpoint, which is returned."""
    tidy(folder)
    checkpoint = last_checkpoint(folder)
    step = step_of(checkpoint) if checkpoint else 0
    cut_off(folder / "metrics.jsonl", lambda row: step > 0 and row["step"] <= step)  # a step is logged when it is done
    cut_off(folder / "samples.jsonl", lambda row: row["step"] < step)  # and its samples bear the steps done before it
    console.print(f"going on from step {step} of {folder}", markup=False)
    return checkpoint


def begun_with(folder: Path, stage: str) -> dict[str, Any]:
    """The settings of a run that may have no checkpoint yet, from its config.yaml; without a digest of the data."""
    return mattering(load(folder / "config.yaml"), stage, ())


def check_same(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    """Raise InputError for the first setting that differs; a missing digest differs from nothing."""
    for key in old.keys() | new.keys():
        before, now = old.get(key, LATER.get(key, ABSENT)), new.get(key, ABSENT)
        if before != now and not (key == "the training data" and None in (before, now)):
            told = "differs from what" if key == "the training data" else f"is {show(now)} but was {show(before)} when"
            raise InputError(f"{key} {told} {where} was made: go on with the same, or start a new run without --resume")


def show(value: Any) -> str:
    return "unknown" if value is ABSENT else json.dumps(value, ensure_ascii=False)


def cut_off(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows of a JSONL file from the first that is not kept, and a last line that was being written."""
    if not file.is_file():
        return
    whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    runs.write_text(file, "".join(line for line in whole if keep(json.loads(line))))


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What `Sealer` was given to keep: shortest answers, alarms."""
    return runs.read_json(checkpoint / SEAL)["state"]
