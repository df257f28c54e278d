"""The entry point: all verbs, environment defaults, and exit codes."""

import errno
import logging
import os
import re
import sys

import typer

# isort: off
from sbtiny.cli import train, data, evaluate, chat, serve, export, bench, info  # noqa: F401  (this is the order of the help)

# isort: on
from sbtiny.cli import streams
from sbtiny.cli.app import app
from sbtiny.disk import is_disk_full
from sbtiny.errors import Failed, InputError

EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141  # a shell's codes for commands ended by SIGINT and SIGPIPE
TILDE = re.compile(r"(|-\w|[\w.-]+=|--set=[\w.]+=)(~[\w.-]*(?:/.*)?)", re.DOTALL)  # in arguments in which the shell does not expand it
LIBRARY_ENVIRONMENT = {  # defaults of variables that libraries read when they are imported
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # oneDNN (torch on a CPU) caches 1,024 kernels with their memory, one for each matrix shape. Answers have all lengths, so a run's
    # memory kept growing. 64 kernels are enough for one pass through a model.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


def main() -> None:
    """Run the CLI: 0 done, 1 failed, 2 wrong input, 130 interrupted; one line for an error, a traceback only with --debug."""
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    streams.accept_any_text()
    if debug := "--debug" in sys.argv:
        logging.getLogger("sbtiny").setLevel(logging.DEBUG)
    arguments = [expand_tilde(a) for a in sys.argv[1:] if a != "--debug"]
    try:
        code = run(arguments, debug)
    except BrokenPipeError:  # while an error line was written
        code = EXIT_UNREAD
    sys.exit(code if streams.try_flush() else EXIT_UNREAD)


def run(arguments: list[str], debug: bool) -> int:
    """Run one verb and return the exit code."""
    try:
        code = app(args=arguments, prog_name="sbtiny", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):  # typer and rich raise it after a broken pipe (`| head`)
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            if streams.broken_streams():
                return EXIT_UNREAD
            error = error.__context__
        if debug:
            raise error
        code, message = explain(error)
        print(message, end="", file=sys.stderr)
    if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code without a message
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def expand_tilde(argument: str) -> str:
    """Expand the ~ of `--output=~/x`, as the shell does in `--output ~/x`."""
    match = TILDE.fullmatch(argument)
    if not match:
        return argument
    from sbtiny.load_settings import expand_home

    return match[1] + expand_home(match[2])


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for an error: 2 if the user can fix it, else 1."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | Failed):
        return (2 if isinstance(error, InputError) else 1), f"error: {text}\n"
    if hasattr(error, "format_message"):  # typer's usage errors: unknown option, missing argument
        usage, context = error.format_message(), getattr(error, "ctx", None)
        if context and usage == context.get_help():  # of a command without arguments
            print(usage)
            return 2, ""
        where = context.command_path if context else "sbtiny"
        return 2, f"error: {' '.join(usage.split())} ({where} --help lists what there is)\n"
    if isinstance(error, OSError) and is_disk_full(error):
        return 2, f"error: cannot write: {text}; free space or choose another --output\n"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return 2, f"error: no file has so long a name as {str(error.filename)[:80]}...: check the path\n"
    return 1, f"error: {type(error).__name__}: {text} (--debug shows where)\n"
