"""The run folder: everything of a run in one place, and nothing in it half-written."""

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from sbtiny import locks
from sbtiny.config import Settings
from sbtiny.errors import InputError

ROOT = Path("runs")
LOCK = ".lock"  # in a run folder while a process writes there
MARKS = ("run.json", "base/eval.json", "sft/run.json")  # files that only a run, or a demo, has


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; free space or write elsewhere")


def check_writable(path: Path) -> None:
    """Raise InputError now, not after hours of work, when `path` cannot be written later. Leaves nothing behind."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise unwritable(path, error) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside and rename: a reader, or a full disk, never sees half a file. Raises InputError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same report
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # renamed already, never made, or on a disk that became read-only
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One more line, whole or not at all: a single write, taken back when the disk had no room for all of it."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise unwritable(path, error) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {path.name} in {path.parent}: was the run finished?") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says of a run: kind, model, format, started and, for one that goes on from another, parent."""
    found = read_json(folder / "run.json")
    if not isinstance(found, dict) or not {"kind", "model"} <= found.keys():
        raise InputError(f"{folder / 'run.json'} has no kind and model: it is no run of sbtiny")
    return {"format": "solution"} | found


def check_base(folder: Path, found: str) -> None:
    """Raise InputError when the model a run names has another fingerprint than the one it was trained on. None noted: none compared."""
    about = read_run(folder)
    if (known := about.get("base", found)) != found:
        named = f"{about['model']} (fingerprint {found}) has other weights than the base {folder} was trained on ({known})"
        raise InputError(f"{named}: put that one back, or say in {folder / 'run.json'} where it is (model)")


def unused(path: Path) -> Path:
    """`path`, or where that is taken `path-2`, `path-3` and so on."""
    names = (path.with_name(f"{path.name}-{n}") if n > 1 else path for n in count(1))
    return next(name for name in names if not name.exists())


def set_aside(folder: Path) -> None:
    """Give an earlier run another name, so that a new one can take its place and nothing is lost; a lock stays where it is.

    Raises InputError for a file, and for a folder of other things: a slip in --output must not move someone's home.
    """
    if folder.exists() and not folder.is_dir():
        raise not_a_run(folder)
    place = folder.resolve()
    entries = [path for path in place.iterdir() if path.name != LOCK] if folder.exists() else []
    if not entries:
        return
    if not any((folder / mark).is_file() for mark in MARKS) or Path.cwd().is_relative_to(place):
        raise not_a_run(folder)
    move(entries, unused(place.with_name(time.strftime(f"{place.name}-before-%Y%m%d-%H%M%S"))))
    with suppress(OSError):  # the lock of this process is in it
        place.rmdir()


def not_a_run(folder: Path) -> InputError:
    return InputError(f"{folder} is there and is no earlier run that can be set aside: choose another --output")


def move(entries: list[Path], target: Path) -> None:
    """All of them into a new folder, or none."""
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
        raise unwritable(target, error) from error


@contextmanager
def claim(kind: str, output: Path | None) -> Iterator[Path]:
    """The folder of a run, `output` or a fresh `runs/<kind>-<time>`, for this process alone.

    Raises InputError, naming the process, where another one has it. A fresh folder that stays empty is removed again.
    """
    folder = output or reserve(kind)
    try:
        with locks.hold(folder / LOCK, folder):
            yield folder
    finally:
        if output is None:
            for made in (folder, ROOT):
                with suppress(OSError):  # no longer empty
                    made.rmdir()


def check_unclaimed(folder: Path) -> None:
    """Raise InputError, before any work, where another process writes into this run folder."""
    locks.check(folder / LOCK, folder)


def reserve(kind: str) -> Path:
    """A new folder `runs/<kind>-<time>` that nobody else gets: who makes it has it."""
    while True:
        folder = unused(ROOT / time.strftime(f"{kind}-%Y%m%d-%H%M%S"))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # made by another process since we looked
            continue
        except OSError as error:
            raise unwritable(folder, error) from error
        return folder


def check_free(folder: Path) -> None:
    """Raise InputError where a new run would mix with one under way, finished or to be resumed, or cannot be written."""
    check_unclaimed(folder)
    if (folder / "adapter").exists():
        raise InputError(f"{folder} already holds a finished run: choose another --output or remove it")
    if any(folder.glob("checkpoint-*")):
        raise InputError(f"{folder} holds an unfinished run: go on with --resume, or choose another --output")
    check_writable(folder / "config.yaml")


def new(kind: str, output: Path | None, settings: Settings, **more: str | bool) -> Path:
    """A fresh run folder `runs/<kind>-<time>` or `output`, with config.yaml in it; `kind` and `more` are kept in run.json.

    `claim` comes before it, for nobody else to write there.

    What an earlier run left there before its first checkpoint is set aside. Raises InputError when the folder cannot be
    made or holds a run already; it is then as it was.
    """
    folder = output or reserve(kind)
    check_free(folder)
    if (folder / "run.json").exists():
        set_aside(folder)
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


def find(name: str) -> Path | None:
    """The run folder a user means: a path or a name under runs/; None when there is none."""
    for folder in (Path(name), ROOT / name):
        with suppress(OSError):  # a name too long for a file is none
            if (folder / "run.json").is_file():
                return folder
    return None


def begun_at(folder: Path) -> tuple[str, int, str]:
    """When a run began, to sort by: as run.json says, for a copied file has a new time; within a second, the file's time, then the name."""
    started, written = read_run(folder).get("started"), (folder / "run.json").stat().st_mtime_ns
    told = started if isinstance(started, str) else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written / 1e9))
    return told, written, folder.name


def check_finished(folder: Path) -> None:
    """Raise InputError for a run without an adapter, and say whether it still trains."""
    if not (folder / "adapter").is_dir():
        who = locks.holder(folder / LOCK)
        why = f"it still trains, in {who}: wait until it ends" if who else "was the run finished?"
        raise InputError(f"{folder} holds no adapter: {why}")


def newest(kind: str) -> Path:
    """The latest finished run of a kind; raises InputError when there is none."""
    found = [path.parent for path in ROOT.glob("*/run.json") if (path.parent / "adapter").is_dir()]
    done = [folder for folder in found if read_run(folder)["kind"] == kind]
    if not done:
        raise InputError(f"no finished {kind} run under {ROOT}/: run `sbtiny {kind}` first or name one with --run")
    return max(done, key=begun_at)


def unfinished(kind: str) -> Path:
    """The latest run of a kind that was begun, not finished, and that no process goes on with; raises InputError when there is none."""
    found = [path.parent for path in ROOT.glob("*/run.json") if not (path.parent / "adapter").exists()]
    begun = [folder for folder in found if read_run(folder)["kind"] == kind and not locks.holder(folder / LOCK)]
    if not begun:
        raise InputError(f"--resume needs --output with the folder of the run to go on with: {ROOT}/ has no unfinished {kind} run")
    return max(begun, key=begun_at)
