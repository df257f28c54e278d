"""The application itself: what holds for every verb, and how a run of it ends."""

import errno
import os
import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sbtiny import __version__
from sbtiny.cli import streams
from sbtiny.errors import Failed, InputError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what the user can mend by writing elsewhere
INTERRUPTED, UNREAD = 130, 141  # as a shell says it of a command that SIGINT or SIGPIPE ended
HOME = re.compile(r"(|-\w|[\w.-]+=|--set=[\w.]+=)(~[\w.-]*(?:/.*)?)", re.DOTALL)  # of an argument, where the shell left it alone
ENVIRONMENT = {  # for libraries that read it when they are imported; what the user has set stands
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # oneDNN, behind torch on a CPU, keeps a kernel and its memory for each shape of a product it has met, 1,024 in each of two caches.
    # Answers are of every length, so a run grew without an end. So many hold one pass through a model.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


class Verbs(TyperGroup):
    """The verbs by panel, in plain text: rich's boxes would take as long to import as all the rest."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = command.rich_help_panel if isinstance(command.rich_help_panel, str) else "Commands"
            panels.setdefault(panel, []).append((name, command.get_short_help_str(200)))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Verbs,
    name="sbtiny",
    help="Fine-tune a small reasoning model so that it says how long it will think, keeps its word, and thinks far less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
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
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import, which already speaks


def main() -> None:
    """Run the CLI: 0 done, 1 failed, 2 wrong input, 130 interrupted; one line for an error, a traceback only with --debug."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    streams.accept_all()
    debug = "--debug" in sys.argv
    arguments = [at_home(a) for a in sys.argv[1:] if a != "--debug"]
    try:
        code = run(arguments, debug)
    except BrokenPipeError:  # in the middle of an error line
        code = UNREAD
    sys.exit(code if streams.flush() else UNREAD)


def run(arguments: list[str], debug: bool) -> int:
    """The exit code."""
    try:
        code = app(args=arguments, prog_name="sbtiny", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = INTERRUPTED
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):  # of `| head`: typer and rich end so where nobody reads on, and typer for any other pipe
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            if streams.unread():
                return UNREAD
            error = error.__context__
        if debug:
            raise error
        code, message = explain(error)
        print(message, end="", file=sys.stderr)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def at_home(argument: str) -> str:
    """`--output=~/x` as the shell would have given `--output ~/x`."""
    found = HOME.fullmatch(argument)
    if not found:
        return argument
    from sbtiny.config import expand_home

    return found[1] + expand_home(found[2])


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for what went wrong, the user's to mend (2) or not (1)."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | Failed):
        return (2 if isinstance(error, InputError) else 1), f"error: {text}\n"
    if hasattr(error, "format_message"):  # typer's usage errors: unknown option, missing argument
        usage, context = error.format_message(), getattr(error, "ctx", None)
        if context and usage == context.get_help():  # of a command that was called without anything
            print(usage)
            return 2, ""
        where = context.command_path if context else "sbtiny"
        return 2, f"error: {' '.join(usage.split())} ({where} --help lists what there is)\n"
    if isinstance(error, OSError) and error.errno in DISK:
        return 2, f"error: cannot write: {text}; free space or choose another --output\n"
    return 1, f"error: {type(error).__name__}: {text} (--debug shows where)\n"
