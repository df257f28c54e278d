"""Checkpoints that are whole or ignored, and that resume only with the settings they were made with.

TRL writes a checkpoint file by file. Our manifest comes last, by a rename. A folder without it, or without a file that it lists, was
being written or removed when the run was killed.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbtiny import distributed, runs
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.load_settings import flatten_keys, load_settings
from sbtiny.progress import print_line
from sbtiny.tasks.sources import digest_items

MANIFEST = "sbtiny.json"
DATA = "the training data"  # the key of its digest in a signature
# May change on resume: they set what is saved, how many rows are taken at once and which are refused as too long, not what is learnt.
RESUMABLE_CHANGES = (
    *("grpo.save_steps", "grpo.sample_steps", "grpo.alarm_patience", "grpo.micro_batch", "grpo.max_num_seqs"),
    *("sft.save_steps", "sft.micro_batch", "sft.max_length"),
)


def resume_signature(settings: Settings, stage: str, data: Sequence[Any]) -> dict[str, Any]:
    """The settings that a stage's weights depend on, by dotted key, and a digest of its rows or questions."""
    everything = asdict(settings)
    chosen = {key: everything[key] for key in ("model", "format", "seed", "four_bit", "backend", "engine", stage)}
    chosen["prompt"] = asdict(settings.prompt.without_empty())
    signature = {key: value for key, value in flatten_keys(chosen) if key not in RESUMABLE_CHANGES}
    return signature | {DATA: digest_data(data)}


def digest_data(data: Sequence[Any]) -> str | None:
    """A digest of rows or questions; None for none."""
    return blake2b(repr(digest_items(data)).encode(), digest_size=8).hexdigest() if data else None


class ManifestCallback(TrainerCallback):
    """Ends every checkpoint with `sbtiny.json`: step, signature (as `settings`), sizes of its files, and the state TRL does not save."""

    def __init__(self, signature: dict[str, Any], state: Callable[[], dict[str, Any]] = dict) -> None:
        self.signature, self.state = signature, state

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save:
            control.should_log = True  # the loss since the last log is only in memory

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        distributed.wait_for_everyone()  # every process writes files into it
        if not distributed.is_main_process():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        runs.sync_files(folder / name for name in sizes)  # the manifest must not reach the disk before the files it lists
        manifest = {"step": state.global_step, "settings": self.signature, "files": sizes, "state": self.state()}
        runs.write_json(folder / MANIFEST, manifest)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / MANIFEST).is_file():
        return False
    files = runs.read_json(checkpoint / MANIFEST)["files"].items()
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files)


def last_checkpoint(folder: Path, upto: float = math.inf) -> Path | None:
    """The newest whole checkpoint of a run up to step `upto`; None when there is none. Changes no file."""
    return max((path for path in folder.glob("checkpoint-*") if is_whole(path) and step_of(path) <= upto), key=step_of, default=None)


def remove_incomplete(folder: Path) -> None:
    """Remove a half-written adapter and checkpoints that are not whole."""
    for path in (folder / ".adapter.tmp", *folder.glob("checkpoint-*")):
        if path.name.startswith(".") or not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def prepare_resume(folder: Path, settings: Settings, stage: str, data: Sequence[Any]) -> Path | None:
    """Rewind an unfinished run to its last whole checkpoint and return that; None when it starts at step 0.

    `data`: the stage's rows or questions. Raises InputError for a finished run, and for a setting that differs, by its name; the folder
    is then unchanged.
    """
    if (folder / "adapter").exists():
        raise InputError(f"{folder} is finished: there is nothing to resume; start a new run without --resume")
    signature = resume_signature(settings, stage, data)
    made = [(original_settings(folder, stage), folder)]
    if checkpoint := last_checkpoint(folder):
        made.append((runs.read_json(checkpoint / MANIFEST)["settings"], checkpoint))
    for old, where in made:
        check_settings_match(old, signature, where, may_have_moved(folder, signature))
    return rewind_to_checkpoint(folder)


def rewind_to_checkpoint(folder: Path) -> Path | None:
    """Drop half-written checkpoints, and log rows after the last whole checkpoint. Returns that checkpoint."""
    remove_incomplete(folder)
    checkpoint = last_checkpoint(folder)
    step = step_of(checkpoint) if checkpoint else 0
    filter_jsonl(folder / "metrics.jsonl", lambda row: step > 0 and row["step"] <= step)  # a step is logged after it
    filter_jsonl(folder / "samples.jsonl", lambda row: row["step"] < step)  # its samples carry the number of steps before it
    print_line(f"going on from step {step} of {folder}")
    return checkpoint


def original_settings(folder: Path, stage: str) -> dict[str, Any]:
    """The signature of a run from its config.yaml and run.json, for a run without a checkpoint. Sampled rows have no digest."""
    return resume_signature(load_settings(folder / "config.yaml"), stage, ()) | {DATA: runs.read_run(folder).get("data")}


def may_have_moved(folder: Path, signature: dict[str, Any]) -> bool:
    """Whether the model may lie at another path than before: its fingerprint is known, and is compared where it is loaded."""
    return "base" in runs.read_run(folder) and Path(signature["model"]).is_absolute()


def check_settings_match(old: dict[str, Any], new: dict[str, Any], where: Path, any_model: bool = False) -> None:
    """Raise InputError for the first setting that differs; a missing digest of the data matches every digest, `any_model` every model.

    A setting that `old` does not know came later: it did then what its default does. One that may change now could not always.
    """
    defaults = dict(flatten_keys(asdict(Settings())))
    compared = (old.keys() | new.keys()) - set(RESUMABLE_CHANGES)
    for key in sorted(compared, key=lambda key: (key == DATA, key)):  # another seed draws other questions
        before, now = old.get(key, defaults.get(key)), new.get(key)
        if before == now or (key == DATA and None in (before, now)) or (key == "model" and any_model):
            continue
        change = f"is {json.dumps(now, ensure_ascii=False)} but was {json.dumps(before, ensure_ascii=False)} when"
        change = "differs from the data with which" if key == DATA else change
        raise InputError(f"{key} {change} {where} was made: resume with the same, or start a new run without --resume")


def filter_jsonl(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the rows of a JSONL file for which `keep` holds; drop the others and a half-written last line."""
    if not file.is_file():
        return
    *lines, _ = file.read_bytes().split(b"\n")  # str.splitlines would cut at the line separators in a question, too
    runs.write_bytes(file, b"".join(line + b"\n" for line in lines if keep(json.loads(line))))


def read_saved_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `ManifestCallback` saved: shortest answers, alarms."""
    return runs.read_json(checkpoint / MANIFEST)["state"]
