"""Several processes that train one run (`accelerate launch -m sbtiny grpo ...`): rank, sharing, splitting.

The launcher sets WORLD_SIZE and RANK. Without a launcher there is one process, and these functions change nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sbtiny import runs
from sbtiny.config import micro_batch_size
from sbtiny.errors import InputError
from sbtiny.progress import console

T = TypeVar("T")
JOIN_TIMEOUT = timedelta(days=1)  # rank 0 may sample cold-start data for hours while the others wait


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """True in the process that writes files and prints."""
    return rank() == 0


def init_process_group() -> None:
    """Join the other processes and silence all but the first. Call it before anything is shared."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=JOIN_TIMEOUT)
        console.quiet = not is_main_process()


def wait_for_everyone() -> None:
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def gather(items: list[T]) -> list[T]:
    """The items of all processes, in the order of their ranks."""
    if world_size() == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's contiguous part of the items; `gather` restores the whole."""
    start, end = (len(items) * n // world_size() for n in (rank(), rank() + 1))
    return items[start:end]


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Run `work` in the first process; return its result, or raise its error, in all. For work that writes files or draws."""
    if world_size() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    outcome: list[T | BaseException | None] = [None]
    if is_main_process():
        try:
            outcome = [work()]
        except Exception as error:  # raised again below, in every process
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def split_batch(total: int, most: int, key: str) -> tuple[int, int]:
    """(Rows per forward pass, passes per update) of each process: at most `most` rows a pass, `total` an update over all processes.

    Raises InputError, naming the settings `key`, if the processes cannot share the rows evenly.
    """
    if total % world_size():
        raise InputError(f"{key} gives {total} rows an update, which {world_size()} processes cannot share evenly: set it to a multiple")
    rows = total // world_size()
    micro = micro_batch_size(rows, most)
    return micro, rows // micro


@contextmanager
def claim(kind: str, output: Path | None) -> Iterator[Path]:
    """`runs.claim` by the first process for all."""
    with ExitStack() as stack:
        yield broadcast_from_main(lambda: stack.enter_context(runs.claim(kind, output)))
