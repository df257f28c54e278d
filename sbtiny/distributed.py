"""Several processes that train one run (`accelerate launch -m sbtiny grpo ...`): who writes, what is shared, who does which part.

A launcher says in the environment how many there are; without one there is one, and nothing here does anything.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sbtiny import runs
from sbtiny.config import micro_batch
from sbtiny.errors import InputError
from sbtiny.progress import console

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # rank 0 may sample cold-start data for hours while the others wait


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def first() -> bool:
    """This is the process that writes and speaks."""
    return rank() == 0


def join() -> None:
    """Meet the others, and leave speaking to the first; call it before anything is shared."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        console.quiet = not first()


def wait() -> None:
    if count() > 1:
        from torch.distributed import barrier

        barrier()


def gather(items: list[T]) -> list[T]:
    """The items of all processes, in the order of their ranks."""
    if count() == 1:
        return items
    from torch.distributed import all_gather_object

    found: list[list[T]] = [[] for _ in range(count())]
    all_gather_object(found, items)
    return [item for part in found for item in part]


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's part: contiguous, so that `gather` puts the whole together again."""
    at = [len(items) * n // count() for n in (rank(), rank() + 1)]
    return items[slice(*at)]


def once(work: Callable[[], T]) -> T:
    """What the first process's `work` returns, or raises, for all of them: what writes or draws must not be done twice."""
    if count() == 1:
        return work()
    from torch.distributed import broadcast_object_list

    told: list[T | BaseException | None] = [None]
    if first():
        try:
            told = [work()]
        except Exception as error:  # raised again below, in every process
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], BaseException):
        raise told[0]
    return told[0]


def share(total: int, most: int, key: str) -> tuple[int, int]:
    """(Rows a forward pass, passes an update) of each process for `total` rows an update: `most` rows, or the next fewer that divide them.

    Raises InputError where the processes cannot share them evenly.
    """
    if total % count():
        raise InputError(f"{key} gives {total} rows an update, which {count()} processes cannot share evenly: set it to a multiple")
    rows = total // count()
    micro = micro_batch(rows, most)
    return micro, rows // micro


@contextmanager
def claim(kind: str, output: Path | None) -> Iterator[Path]:
    """`runs.claim` by the first process, for all of them."""
    with ExitStack() as stack:
        yield once(lambda: stack.enter_context(runs.claim(kind, output)))
