"""Progress on stderr for everything that takes longer than a blink: what, how far, how fast, how long still."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; the yielded function is called with `done=1` and an optional `note` such as tokens a second."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(done: int = 1, note: str | None = None) -> None:
            progress.update(task, advance=done, **({} if note is None else {"note": note}))

        yield advance


def quieten_libraries() -> None:
    """Our bars say how far the work is; the libraries' own bars and notices only break them. Errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
