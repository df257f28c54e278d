"""Progress bars on stderr: what runs, how far it is, how fast, how long it will take."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


class Bar(Progress):
    """A progress bar with something below it."""

    below: RenderableType = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield self.below


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar. The yielded function advances it by `done`, and sets a `note` such as tokens per second and what is `below`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(done: int = 1, note: str | None = None, below: RenderableType = "") -> None:
            progress.below = below or progress.below
            progress.update(task, advance=done, **({} if note is None else {"note": note}))

        yield advance


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def print_line(line: str) -> None:
    """Print a line on stderr as it is: unstyled, and not wrapped."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def quiet_while_loading() -> Iterator[None]:
    """Hold back bars and notices of what loads models, and leave a user's own choices as they were. Warnings of Python and errors show."""
    from transformers.utils import logging

    noisy = getLogger("bitsandbytes")  # it misses a kernel that a CPU does not need
    levels, had_bars = (logging.get_verbosity(), noisy.level), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    noisy.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(levels[0])
        noisy.setLevel(levels[1])
        if had_bars:
            logging.enable_progress_bar()


def quieten_libraries() -> None:
    """Turn off the libraries' bars and notices, which would break ours. Errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
