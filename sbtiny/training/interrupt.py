"""Clean up after an interrupted run and resume it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from sbtiny import distributed
from sbtiny.config import Settings
from sbtiny.disk import disk_full_reason
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.training import checkpoint


@contextmanager
def cleanup_on_stop(folder: Path, verb: str) -> Iterator[None]:
    """Leave nothing half-written when a run stops. After Ctrl-C, print how to resume. Raises InputError for a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        if not distributed.is_main_process():
            raise
        checkpoint.remove_incomplete(folder)
        saved = checkpoint.last_checkpoint(folder)
        console.print(f"\nstopped; {folder} keeps metrics and samples", f"and {saved.name}" if saved else "")
        console.print(f"go on with: sbtiny {verb} --resume --output {quote(str(folder))}", markup=False)
        raise
    except Exception as error:  # libraries raise errors of no common class when they cannot write
        if distributed.is_main_process():
            checkpoint.remove_incomplete(folder)
        if reason := disk_full_reason(error):
            raise InputError(f"cannot write {folder}: {reason}; free space or choose another --output") from error
        raise


def resume_checkpoint(folder: Path, settings: Settings, stage: str, data: Sequence[Any]) -> Path | None:
    """The checkpoint to resume the run in `folder` from; None when it has none. Raises InputError for a setting that differs."""
    signature = checkpoint.resume_signature(settings, stage, data)
    original, moved = checkpoint.original_settings(folder, stage), checkpoint.may_have_moved(folder, signature)
    checkpoint.check_settings_match(original, signature, folder, moved)
    return checkpoint.prepare_resume(folder, signature)
