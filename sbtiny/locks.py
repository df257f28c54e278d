"""Locks, so that one process at a time writes a file or folder; a second one gets an InputError that names the first.

The lock is the system's (flock, LockFileEx) on a file beside the output. It ends with its process, even by kill -9: a leftover lock file
locks nothing.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from sbtiny.errors import InputError

HELD_LOCKS: set[Path] = set()  # by this process; a demo holds its folder, and each of its stages locks it again


def lock_path(path: Path) -> Path:
    """The path of the lock for a file, or for a folder that is replaced as a whole. Raises InputError for a path without a name (`.`)."""
    if not path.name:
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    return path.with_name(f".{path.name}.lock")


@contextmanager
def hold(path: Path, what: Path) -> Iterator[None]:
    """Lock the file `path` to own `what`. Afterwards remove `path`, and the folders made for it that are still empty.

    Raises InputError, naming the process, if another one has the lock.
    """
    path = path.resolve()
    if path in HELD_LOCKS:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    file = open_locked(path, what)
    HELD_LOCKS.add(path)
    try:
        yield
    finally:
        HELD_LOCKS.discard(path)
        with suppress(OSError):  # gone, on a disk that became read-only, or open on Windows
            path.unlink()
        file.close()
        for folder in made:
            with suppress(OSError):  # no longer empty
                folder.rmdir()


def open_locked(path: Path, what: Path) -> FileIO:
    """Open and lock the file, and write the name of this process into it. Raises InputError if another process has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {what}: {error.strerror or error}; choose another place") from error
        if not lock(file, what):
            who = describe_holder(file)
            file.close()
            raise in_use_error(what, who)
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                name_holder(file)
                return file
        file.close()  # its holder removed the file after we opened it and before we locked it


def lock(file: FileIO, what: Path) -> bool:
    """Try to lock; False if another process has the lock. On a file system without locks: print a warning, return True."""
    from filelock import lock_descriptor

    from sbtiny.progress import console

    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        why = error.strerror or str(error)
        console.print(f"no lock on {what} ({why}): make sure that nothing else writes there", style="yellow", markup=False, soft_wrap=True)
        return True


def name_holder(file: FileIO) -> None:
    """Write pid, host and time after an empty first byte, the locked one: Windows lets nobody read that."""
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk; the lock holds without a name
        file.truncate(0)
        file.write(b" " + json.dumps(about).encode())


def describe_holder(file: FileIO) -> str:
    """Describe the process that has the lock."""
    for _ in range(20):  # it writes its name just after it has locked the file
        with suppress(OSError, ValueError, KeyError, TypeError):
            file.seek(1)
            about = json.loads(file.read())
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        time.sleep(0.02)
    return "another process"


def in_use_error(what: Path, who: str) -> InputError:
    return InputError(f"{what} is in use by {who}: wait until it ends, stop it, or choose another place to write")


def holder(path: Path) -> str | None:
    """Describe the other process that has the lock on `path`; None if there is none."""
    if path.resolve() in HELD_LOCKS:
        return None
    try:
        file = path.open("r+b", buffering=0)
    except OSError:  # usually there is no such file
        return None
    with file:
        from filelock import lock_descriptor

        try:
            return None if lock_descriptor(file.fileno(), blocking=False) else describe_holder(file)
        except OSError:  # a file system without locks; `lock` warns of it
            return None


def raise_if_locked(path: Path, what: Path) -> None:
    """Raise InputError if another process has the lock on `path`. Call it before models are loaded."""
    if who := holder(path):
        raise in_use_error(what, who)
