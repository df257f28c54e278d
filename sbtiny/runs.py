"""Run folders: their files, written whole or not at all; how to make, find and claim them."""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from sbtiny import locks
from sbtiny.config import AUTO, PromptSettings, Settings
from sbtiny.disk import disk_full_error
from sbtiny.errors import InputError

ROOT = Path("runs")
LOCK = ".lock"  # in a run folder while a process writes there
RUN_FILES = ("run.json", "base/eval.json", "sft/run.json")  # files that only a run, or a demo, has


def write_error(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; free space or write elsewhere")


def check_writable(path: Path, *read: str | Path | None) -> None:
    """Raise InputError if the file `path` could not be written, or is one of those that are `read` (FILE or FILE#N).

    Call it before hours of work; it leaves nothing behind.
    """
    files = [Path(name) for other in read if other for name in (other, str(other).rpartition("#")[0])]
    if path.exists() and any(path.samefile(file) for file in files if file.exists()):
        raise InputError(f"{path} is what is read: give another file to write")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise write_error(path, error) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that no reader sees half a file. Raises InputError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same report
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # renamed already, never made, or on a disk that became read-only
            temporary.unlink()


def sync_files(files: Iterable[Path]) -> None:
    """Bring files that another library wrote to the disk, before they are renamed or listed."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line in a single write; remove it and raise InputError if the disk had no room for all of it."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise disk_full_error()
    except OSError as error:
        raise write_error(path, error) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {path.name} in {path.parent}: was the run finished?") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # thousands of brackets
        raise InputError(f"{path} is not valid JSON: {error}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json: kind, model, format, started, and parent if the run started from another one (parents: an average)."""
    about = read_json(folder / "run.json")
    if not isinstance(about, dict) or not {"kind", "model", "format"} <= about.keys():
        raise InputError(f"{folder / 'run.json'} has no kind, model and format: it is no run of sbtiny")
    if not (isinstance(parents := about.get("parents", []), list) and all(isinstance(parent, str) for parent in parents)):
        raise InputError(f"{folder / 'run.json'}: parents is no list of folders: write the runs that it is the average of")
    return about


def kept_prompt(folder: Path, wanted: PromptSettings) -> PromptSettings:
    """The instruction and system turn that a run was trained with. Raises InputError where others are wanted; null wants none."""
    kept = PromptSettings(**read_run(folder).get("prompt", {}))
    for name, text in asdict(wanted).items():
        if text is not None and text != (known := getattr(kept, name) or ""):
            raise InputError(f"prompt.{name} is {text!r}, but {folder} was trained with {known!r}: leave it out, or train a new run")
    return PromptSettings(instruction=kept.instruction or "", system=kept.system or "")


def kept_max_tokens(folder: Path, wanted: int | str) -> int | str:
    """Most tokens of an answer: for auto, the number that the run in this folder chose when it began."""
    return read_run(folder).get("max_tokens", wanted) if wanted == AUTO else wanted


def check_base(folder: Path, fingerprint: str, base: str | None = None) -> None:
    """Raise InputError if the fingerprint of a run's model is not the one in its run.json. Runs without one pass.

    `base`: the model, if not the one that run.json names.
    """
    about = read_run(folder)
    if (known := about.get("base", fingerprint)) != fingerprint:
        named = f"{base or about['model']} (fingerprint {fingerprint}) has other weights than the base {folder} was trained on ({known})"
        raise InputError(f"{named}: put that one back, or say with --base where it is")


def free_path(path: Path) -> Path:
    """`path` or, if that exists, the first free of `path-2`, `path-3`, ..."""
    names = (path.with_name(f"{path.name}-{n}") if n > 1 else path for n in count(1))
    return next(name for name in names if not name.exists())


def archive_run(folder: Path) -> None:
    """Rename an earlier run to `<folder>-before-<time>`; its lock stays, and so do those that a kill left in a folder with nothing else.

    Raises InputError for anything but a run folder: a wrong --output must not move other files.
    """
    if folder.exists() and not folder.is_dir():
        raise not_a_run(folder)
    place = folder.resolve()
    if all(path.name == LOCK or path.is_dir() for path in place.rglob("*")):
        return
    if not any((folder / mark).is_file() for mark in RUN_FILES) or Path.cwd().is_relative_to(place):
        raise not_a_run(folder)
    entries = [path for path in place.iterdir() if path.name != LOCK]
    move_entries(entries, free_path(place.with_name(time.strftime(f"{place.name}-before-%Y%m%d-%H%M%S"))))
    with suppress(OSError):  # the lock of this process is in it
        place.rmdir()


def not_a_run(folder: Path) -> InputError:
    return InputError(f"{folder} is there and is no earlier run that can be set aside: choose another --output")


def move_entries(entries: list[Path], target: Path) -> None:
    """Move all entries into the new folder `target`, or none. Raises InputError if they cannot be moved."""
    try:
        target.mkdir()
        for entry in entries:
            entry.rename(target / entry.name)
    except OSError as error:
        for entry in entries:
            with suppress(OSError):  # never moved
                (target / entry.name).rename(entry)
        with suppress(OSError):  # never made
            target.rmdir()
        raise write_error(target, error) from error


@contextmanager
def claim(kind: str, output: Path | None) -> Iterator[Path]:
    """Lock the folder of a run: `output` or a new `runs/<kind>-<time>`, which is removed if it stays empty.

    Raises InputError, naming the process, if another one has it.
    """
    folder = output or make_run_folder(kind)
    try:
        with locks.hold(folder / LOCK, folder):
            yield folder
    finally:
        if output is None:
            for made in (folder, ROOT):
                with suppress(OSError):  # no longer empty
                    made.rmdir()


def check_unclaimed(folder: Path) -> None:
    """Raise InputError if another process writes into this run folder."""
    locks.raise_if_locked(folder / LOCK, folder)


def make_run_folder(kind: str) -> Path:
    """Make a new folder `runs/<kind>-<time>`. Making it is atomic, so no two processes get the same."""
    while True:
        folder = free_path(ROOT / time.strftime(f"{kind}-%Y%m%d-%H%M%S"))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # made by another process in the meantime
            continue
        except OSError as error:
            raise write_error(folder, error) from error
        return folder


def check_free(folder: Path) -> None:
    """Raise InputError if the folder cannot be written or holds a finished run, an unfinished one or one in progress."""
    check_unclaimed(folder)
    if (folder / "adapter").exists():
        raise InputError(f"{folder} already holds a finished run: choose another --output or remove it")
    if any(folder.glob("checkpoint-*")):
        raise InputError(f"{folder} holds an unfinished run: go on with --resume, or choose another --output")
    check_writable(folder / "config.yaml")


def check_can_begin(folder: Path | None) -> None:
    """Raise InputError if a run cannot begin in `folder`; None is a new one under runs/."""
    if folder is None:
        check_writable(ROOT / "new" / "config.yaml")
    else:
        check_free(folder)


def create_run(kind: str, folder: Path, settings: Settings, **more: Any) -> Path:
    """Start a run in `folder`, which it returns: write config.yaml, and run.json with `kind` and `more`.

    Call `claim` first. A run that stopped there before its first checkpoint is archived. Raises InputError, and changes nothing,
    if the folder cannot be made or holds a run.
    """
    check_free(folder)
    if (folder / "run.json").exists():
        archive_run(folder)
    about = {"kind": kind, "model": settings.model, "format": settings.format, "started": time.strftime("%Y-%m-%d %H:%M:%S"), **more}
    try:
        write_text(folder / "config.yaml", settings.as_yaml())
        write_json(folder / "run.json", about)
    except InputError:
        with suppress(OSError):
            (folder / "config.yaml").unlink(missing_ok=True)
            folder.rmdir()
        raise
    return folder


def find_run(name: str) -> Path | None:
    """The run folder at a path, or with a name under runs/; None if there is none."""
    for folder in (Path(name), ROOT / name):
        with suppress(OSError):  # the name is too long for a file
            if (folder / "run.json").is_file():
                return folder
    return None


def start_key(folder: Path) -> tuple[str, int, str]:
    """Sort key of runs: start time by run.json (a copied file has a new time), then the file's time, then the name."""
    return str(read_run(folder).get("started", "")), (folder / "run.json").stat().st_mtime_ns, folder.name


def check_finished(folder: Path) -> None:
    """Raise InputError for a run without an adapter; the message says if it still trains."""
    if not (folder / "adapter").is_dir():
        who = locks.holder(folder / LOCK)
        why = f"it still trains, in {who}: wait until it ends" if who else "was the run finished?"
        raise InputError(f"{folder} holds no adapter: {why}")


def find_runs(kind: str, finished: bool) -> list[Path]:
    """The folders under runs/ of a kind, with an adapter or without."""
    folders = [path.parent for path in ROOT.glob("*/run.json") if (path.parent / "adapter").is_dir() == finished]
    return [folder for folder in folders if read_run(folder)["kind"] == kind]


def newest_run(kind: str) -> Path:
    """The latest finished run of a kind. Raises InputError if there is none."""
    finished = find_runs(kind, finished=True)
    if not finished:
        raise InputError(f"no finished {kind} run under {ROOT}/: run `sbtiny {kind}` first or name one with --run")
    return max(finished, key=start_key)


def newest_unfinished(kind: str) -> Path:
    """The latest unfinished run of a kind that no process has locked. Raises InputError if there is none."""
    unfinished = [folder for folder in find_runs(kind, finished=False) if not locks.holder(folder / LOCK)]
    if not unfinished:
        raise InputError(f"--resume needs --output with the folder of the run to go on with: {ROOT}/ has no unfinished {kind} run")
    return max(unfinished, key=start_key)
