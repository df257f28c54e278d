"""Clean up after an interrupted run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from sbtiny import distributed
from sbtiny.disk import disk_full_reason
from sbtiny.errors import InputError
from sbtiny.progress import print_line
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
        print_line(f"\nstopped; {folder} keeps its files" + (f", {saved.name} among them" if saved else ""))
        print_line(f"go on with: sbtiny {verb} --resume --output {quote(str(folder))}")
        raise
    except Exception as error:  # libraries raise errors of no common class when they cannot write
        if distributed.is_main_process():
            checkpoint.remove_incomplete(folder)
        if reason := disk_full_reason(error):
            raise InputError(f"cannot write {folder}: {reason}; free space or choose another --output") from error
        raise
