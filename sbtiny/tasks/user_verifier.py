"""A verifier of the user's own: `check(question, completion) -> bool | float` in a Python file.

`question` is the Question (text, answer, level, id), `completion` the text of an answer. A function of three parameters gets
(completion, question text, reference answer) instead. Of a number from 0 to 1, 0.5 or more is right.

The file may import modules of its folder, unless an installed module has the same name.
"""

import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from importlib.util import module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from types import FrameType, ModuleType
from typing import TypeVar

from sbtiny.errors import InputError
from sbtiny.progress import print_line
from sbtiny.tasks.sources import Question

RIGHT = 0.5  # least value of a right answer
ALL_FAILED = 20  # failures without a success that prove the verifier wrong
SHOWN_FAILURES = 5  # failures that are printed
TIMEOUT_S = 5.0  # for one answer
REPEAT_S = 0.1  # seconds until the next alarm, for code that caught the first
T = TypeVar("T")


class UserVerifier:
    """The user's function as a verifier.

    A failure counts as a wrong answer and is printed with its question. Raises InputError when the first ALL_FAILED answers
    all fail.
    """

    def __init__(self, path: Path, function: str) -> None:
        self.path, self.name = path, f"{path}:{function}"
        self.helpers: dict[str, ModuleType] = {}
        self.check, self.shape = load_user_function(path, function, self.helpers)
        self.failed = self.worked = 0

    def __call__(self, completion: str, question: Question) -> bool:
        arguments = (question, completion) if self.shape == 2 else (completion, question.question, question.answer)
        try:
            with importing_from(self.path.absolute().parent, self.helpers):
                verdict = with_timeout(self.check, *arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's code may raise anything, even SystemExit; it is printed with its place
            return self.wrong(question, f"raised {format_user_error(error, self.path)}", error)
        if type(verdict).__name__ in ("bool", "bool_"):  # bool_ is numpy's
            self.worked += 1
            return bool(verdict)
        if isinstance(verdict, Real) and 0 <= verdict <= 1:
            self.worked += 1
            return bool(verdict >= RIGHT)
        return self.wrong(question, f"returned {verdict!r}: return True, False or a number from 0 to 1")

    def wrong(self, question: Question, what: str, cause: BaseException | None = None) -> bool:
        self.failed += 1
        line = f"verifier {self.name} on {question.location} {what}"
        if self.failed >= ALL_FAILED and not self.worked:
            raise InputError(f"{line}; it failed on each of the first {self.failed} answers") from cause
        if self.failed <= SHOWN_FAILURES:
            more = " (further failures are counted as wrong too, and not shown)" if self.failed == SHOWN_FAILURES else ""
            print_line(f"{line}; counted as wrong{more}")
        return False


class VerifierTimeout(BaseException):
    """The check took too long. Not an Exception: code that retries on every Exception would never stop."""


def with_timeout(check: Callable[..., T], *arguments: object) -> T:
    """Call `check`; VerifierTimeout is raised inside it after TIMEOUT_S.

    Needs the main thread and a system with alarms; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return check(*arguments)
    is_checking = True

    def stop(_: int, __: FrameType | None) -> None:
        if is_checking:
            raise VerifierTimeout(f"took longer than {TIMEOUT_S:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S, REPEAT_S)
        return check(*arguments)
    finally:
        is_checking = False  # first, as the next alarm may come at once
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def importing_from(folder: Path, helpers: dict[str, ModuleType]) -> Iterator[None]:
    """Make modules of `folder` importable, after all others, for the duration; other code and other verifiers do not see them.

    Imported modules are kept in `helpers`, a dict of one verifier, so that a reloaded verifier reads them anew.
    """
    before, place, quick = dict(sys.modules), str(folder), sys.dont_write_bytecode
    sys.modules.update(helpers)
    sys.path.append(place)
    sys.dont_write_bytecode = True  # bytecode would hide an edit within the same second
    try:
        yield
    finally:
        sys.dont_write_bytecode = quick
        if place in sys.path:  # the user's code may have removed it
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(place)]
        fresh = {name: module for name, module in sys.modules.items() if name.partition(".")[0] not in before}
        helpers.update((name, fresh[name]) for name in fresh if lies_in(fresh.get(name.partition(".")[0]), folder))
        for name in helpers:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def lies_in(module: ModuleType | None, folder: Path) -> bool:
    """Whether a module is a file of this folder or a package in it. Deeper ones may be installed packages of an environment."""
    file, paths = getattr(module, "__file__", None), getattr(module, "__path__", ())
    return folder in [Path(place).parent for place in (file, *paths) if place]


def load_user_function(path: Path, function: str, helpers: dict[str, ModuleType]) -> tuple[Callable[..., bool | float], int]:
    """Load the function; returns it and its number of arguments, 2 or 3. Raises InputError when it is missing or takes others."""
    if not path.is_file():
        raise InputError(f"no verifier file {path}: give it as my.py:check")
    check = getattr(load_user_module(path, helpers), function, None)
    if not callable(check):
        raise InputError(f"{path} has no function {function!r}: define {function}(question, completion) -> bool")
    for arguments in (("question", "completion"), ("response", "question", "answer")):
        try:
            inspect.signature(check).bind(*arguments)
        except TypeError:
            continue
        return check, len(arguments)
    raise InputError(f"{path}:{function} must take (question, completion), or (response, question, answer)")


def load_user_module(path: Path, helpers: dict[str, ModuleType]) -> ModuleType:
    invalidate_caches()  # for a helper file written just now
    spec = spec_from_file_location(f"sbtiny_verifier_{path.stem}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        with importing_from(path.absolute().parent, helpers):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may even call sys.exit
        raise InputError(f"verifier file {path} does not load: {format_user_error(error, path)}") from error
    return module


def format_user_error(error: BaseException, path: Path) -> str:
    """Format an exception in one line: type, message, and line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":") + place
