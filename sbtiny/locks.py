"""One process at a time for a place that is written for hours: who has it, and the line for whoever comes second.

The lock is the system's own (flock, LockFileEx) on a file beside what is written: it ends with its process, kill -9 included, and a file
that is left behind locks nothing.
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

HELD: set[Path] = set()  # by this process: a demo holds its folder, and each stage of it asks for it again


def beside(path: Path) -> Path:
    """The lock of a file, or of a folder that is replaced as a whole."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def hold(path: Path, what: Path) -> Iterator[None]:
    """Have `what` alone, by a lock on the file `path`, which is gone afterwards with the folders that were made for it and stay empty.

    Raises InputError, naming the process, where another one has it.
    """
    path = path.resolve()
    if path in HELD:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    file = take(path, what)
    HELD.add(path)
    try:
        yield
    finally:
        HELD.discard(path)
        with suppress(OSError):  # gone, on a disk that became read-only, or open on Windows
            path.unlink()
        file.close()
        for folder in made:
            with suppress(OSError):  # no longer empty
                folder.rmdir()


def take(path: Path, what: Path) -> FileIO:
    """The open file that bears the lock, with the name of this process in it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {what}: {error.strerror or error}; choose another place") from error
        if not lock(file, what):
            who = named(file)
            file.close()
            raise busy(what, who)
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                name_holder(file)
                return file
        file.close()  # its holder ended, and removed the file, between our opening and our locking


def lock(file: FileIO, what: Path) -> bool:
    """Whether this process has the lock now; where the file system knows none, it goes on and says so."""
    from filelock import lock_descriptor

    from sbtiny.progress import console

    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        why = error.strerror or str(error)
        console.print(f"no lock on {what} ({why}): see to it that nothing else writes there", style="yellow", markup=False, soft_wrap=True)
        return True


def name_holder(file: FileIO) -> None:
    """Write pid, host and time; the first byte stays empty, for where it is locked Windows lets nobody read it."""
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk: the lock holds, and only the name is missing
        file.truncate(0)
        file.write(b" " + json.dumps(about).encode())


def named(file: FileIO) -> str:
    """The process that has the lock, for a person."""
    for _ in range(20):  # it writes its name a moment after it has the lock
        with suppress(OSError, ValueError, KeyError, TypeError):
            file.seek(1)
            about = json.loads(file.read())
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        time.sleep(0.02)
    return "another process"


def busy(what: Path, who: str) -> InputError:
    return InputError(f"{what} is in use by {who}: wait until it ends, stop it, or choose another place to write")


def holder(path: Path) -> str | None:
    """The other process that has the lock on `path`; None when there is none. Leaves everything as it is."""
    if path.resolve() in HELD:
        return None
    try:
        file = path.open("r+b", buffering=0)
    except OSError:  # mostly: there is no such file
        return None
    with file:
        from filelock import lock_descriptor

        try:
            return None if lock_descriptor(file.fileno(), blocking=False) else named(file)
        except OSError:  # no locks here; `lock` says so
            return None


def check(path: Path, what: Path) -> None:
    """Raise InputError at once, not after models are loaded, where another process has the lock on `path`."""
    if who := holder(path):
        raise busy(what, who)
