"""The run folder: everything of a run in one place, and nothing in it half-written."""

import errno
import json
import os
import tempfile
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from sbtiny.config import Settings
from sbtiny.errors import InputError

ROOT = Path("runs")
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


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a full disk, never sees half a file. Raises InputError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # renamed already, never made, or on a disk that became read-only
            temporary.unlink()


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
    """Give an earlier run another name, so that a new one can take its place and nothing is lost.

    Raises InputError for a file, and for a folder of other things: a slip in --output must not move someone's home.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    place = folder.resolve()
    if not any((folder / mark).is_file() for mark in MARKS) or Path.cwd().is_relative_to(place):
        raise InputError(f"{folder} is there and is no earlier run that can be set aside: choose another --output")
    try:
        place.rename(unused(place.with_name(time.strftime(f"{place.name}-before-%Y%m%d-%H%M%S"))))
    except OSError as error:
        raise unwritable(folder, error) from error


def check_free(folder: Path) -> None:
    """Raise InputError where a new run would mix with one that is finished or can be resumed, or cannot be written."""
    if (folder / "adapter").exists():
        raise InputError(f"{folder} already holds a finished run: choose another --output or remove it")
    if any(folder.glob("checkpoint-*")):
        raise InputError(f"{folder} holds an unfinished run: go on with --resume, or choose another --output")
    check_writable(folder / "config.yaml")


def new(kind: str, output: Path | None, settings: Settings, **more: str | bool) -> Path:
    """A fresh run folder `runs/<kind>-<time>` or `output`, with config.yaml in it; `kind` and `more` are kept in run.json.

    What an earlier run left there before its first checkpoint is set aside. Raises InputError when the folder cannot be
    made or holds a run already; it is then as it was.
    """
    folder = output or unused(ROOT / time.strftime(f"{kind}-%Y%m%d-%H%M%S"))
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


def newest(kind: str) -> Path:
    """The latest finished run of a kind; raises InputError when there is none."""
    found = [path.parent for path in ROOT.glob("*/run.json") if (path.parent / "adapter").is_dir()]
    done = [folder for folder in found if read_run(folder)["kind"] == kind]
    if not done:
        raise InputError(f"no finished {kind} run under {ROOT}/: run `sbtiny {kind}` first or name one with --run")
    return max(done, key=lambda folder: (folder / "run.json").stat().st_mtime)


def unfinished(kind: str) -> Path:
    """The latest run of a kind that was begun and not finished; raises InputError when there is none."""
    found = [path.parent for path in ROOT.glob("*/run.json") if not (path.parent / "adapter").exists()]
    begun = [folder for folder in found if read_run(folder)["kind"] == kind]
    if not begun:
        raise InputError(f"--resume needs --output with the folder of the run to go on with: {ROOT}/ has no unfinished {kind} run")
    return max(begun, key=lambda folder: (folder / "run.json").stat().st_mtime)
