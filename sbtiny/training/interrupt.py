"""A run that stops, whatever stops it: what is kept, what is said, and where it goes on."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.training import checkpoint
from sbtiny import distributed

# As the system and safetensors say it; torch.save names its own file where it could not write.
DISK = re.compile("No space left on device|Disk quota exceeded|File too large|Read-only file system|inline_container")


@contextmanager
def keeping(folder: Path, verb: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C, and leave nothing half-written: a full disk is the user's to mend."""
    try:
        yield
    except KeyboardInterrupt:
        if not distributed.first():
            raise
        checkpoint.tidy(folder)
        saved = checkpoint.last_checkpoint(folder)
        console.print(f"\nstopped; {folder} keeps metrics and samples", f"and {saved.name}" if saved else "")
        console.print(f"go on with: sbtiny {verb} --resume --output {quote(str(folder))}", markup=False)
        raise
    except Exception as error:  # what the libraries raise when they cannot write is of no common kind
        if distributed.first():
            checkpoint.tidy(folder)
        if reason := DISK.search(str(error)):
            why = "torch could not write all of a file" if reason[0] == "inline_container" else reason[0]
            raise InputError(f"cannot write {folder}: {why}; free space or choose another --output") from error
        raise


def going_on(folder: Path, settings: Settings, stage: str, data: Sequence[Any]) -> Path | None:
    """The checkpoint to go on from; the run in `folder` may have none yet. Raises InputError for a setting that differs."""
    matters = checkpoint.mattering(settings, stage, data)
    checkpoint.check_same(checkpoint.begun_with(folder, stage), matters, folder)
    return checkpoint.go_on(folder, matters)
