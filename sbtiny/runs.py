"""The run folder: everything of a run in one place, and nothing in it half-written."""

import json
import os
import time
from pathlib import Path
from typing import Any

from sbtiny.config import Settings
from sbtiny.errors import InputError

ROOT = Path("runs")


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
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --output"
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One more line: a single write, so that a kill leaves whole lines."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --output"
        ) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {path.name} in {path.parent}: was the run finished?") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def set_aside(folder: Path) -> None:
    """Give an earlier run another name, so that a new one can take its place and nothing is lost."""
    if folder.exists():
        folder.rename(folder.with_name(time.strftime(f"{folder.name}-before-%Y%m%d-%H%M%S")))


def new(kind: str, output: Path | None, settings: Settings, **more: str) -> Path:
    """A fresh run folder `runs/<kind>-<time>` or `output`, with config.yaml in it; `kind` is remembered in run.json.

    Raises InputError when it cannot be made or is a finished run already.
    """
    folder = output or ROOT / time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    if (folder / "adapter").exists():
        raise InputError(f"{folder} already holds a finished run: choose another --output or remove it")
    write_text(folder / "config.yaml", settings.as_yaml())
    write_json(
        folder / "run.json", {"kind": kind, "model": settings.model, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    )
    return folder


def find(name: str) -> Path | None:
    """The run folder a user means: a path or a name under runs/; None when there is none."""
    for folder in (Path(name), ROOT / name):
        if (folder / "run.json").is_file():
            return folder
    return None


def newest(kind: str) -> Path:
    """The latest finished run of a kind; raises InputError when there is none."""
    done = [
        path.parent
        for path in ROOT.glob("*/run.json")
        if (path.parent / "adapter").is_dir() and read_json(path)["kind"] == kind
    ]
    if not done:
        raise InputError(f"no finished {kind} run under {ROOT}/: run `sbtiny {kind}` first or name one with --run")
    return max(done, key=lambda folder: (folder / "run.json").stat().st_mtime)
