"""An export is built beside its place and takes it when it is whole: nobody finds half of one."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sbtiny import locks
from sbtiny.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: more than the disk, FAT for one, or a limit lets a file have
# What safetensors says of it, and numpy, which gives no number: "65536 requested and 14768 written".
SHORT = re.compile(r"No space left|File too large|\d+ requested and \d+ written")


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder to build in, beside `folder`; gone when the work fails. A full disk becomes one line.

    Raises InputError where another process builds the same.
    """
    with locks.hold(locks.beside(folder), folder), built(folder) as building:
        yield building


@contextmanager
def built(folder: Path) -> Iterator[Path]:
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of an export that was killed
    try:
        building.mkdir(parents=True)
        yield building
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) in FULL or SHORT.search(str(error)):
            raise InputError(f"no space left for {folder}: free some, write fewer kinds, or choose another --output") from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def place(building: Path, folder: Path) -> None:
    """Put a finished export under its name; an earlier one goes only then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
