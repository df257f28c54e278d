"""The application itself: what holds for every verb, and how a run of it ends."""

import errno
import logging
import os
import sys
from typing import Annotated

import typer

from sbtiny import __version__
from sbtiny.errors import Failed, InputError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what the user can mend by writing elsewhere
INTERRUPTED = 130
ENVIRONMENT = {  # for libraries that read it when they are imported; what the user has set stands
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # oneDNN, behind torch on a CPU, keeps a kernel and its memory for each shape of a product it has met, 1,024 in each of two caches.
    # Answers are of every length, so a run grew without an end. So many hold one pass through a model.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}

app = typer.Typer(
    name="sbtiny",
    help="Fine-tune a small reasoning model so that it says how long it will think, keeps its word, and thinks far less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(wanted: bool) -> None:
    if wanted:
        print(f"sbtiny {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What holds for every verb."""


def main() -> None:
    """Run the CLI: 0 done, 1 failed, 2 wrong input, 130 interrupted; one line for an error, a traceback only with --debug."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import, which already speaks
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(args=arguments, prog_name="sbtiny", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        code, message = explain(error)
        print(message, end="", file=sys.stderr)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for what went wrong, the user's to mend (2) or not (1)."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | Failed):
        return (2 if isinstance(error, InputError) else 1), f"error: {text}\n"
    if hasattr(error, "format_message"):  # typer's usage errors: unknown option, missing argument
        usage = " ".join(error.format_message().split())
        where = error.ctx.command_path if getattr(error, "ctx", None) else "sbtiny"
        return 2, f"error: {usage} ({where} --help lists what there is)\n" if usage else ""  # help was printed already
    if isinstance(error, OSError) and error.errno in DISK:
        return 2, f"error: cannot write: {text}; free space or choose another --output\n"
    return 1, f"error: {type(error).__name__}: {text} (--debug shows where)\n"
