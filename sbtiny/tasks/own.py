"""A verifier of the user's own: `check(question, completion) -> bool | float` in a Python file.

`question` is the Question (its text, answer, level and id), `completion` the text of an answer. A function of three parameters
gets (completion, question text, reference answer) instead. A number from 0 to 1 is right from 0.5 on.
"""

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from types import ModuleType

from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.limit import limited
from sbtiny.tasks.sources import Question

RIGHT = 0.5  # from which number on an answer is right
ALL_FAILED = 20  # failures, and nothing else, after which the verifier itself must be wrong
SHOWN = 5  # failures that are told; of the rest only the number


class OwnVerifier:
    """The user's function as a verifier.

    A failure inside counts as a wrong answer, is told with its question, and stops nothing; only a function that fails
    from the start on every answer is an InputError.
    """

    def __init__(self, path: Path, function: str) -> None:
        self.path, self.name = path, f"{path}:{function}"
        self.check, self.shape = own_function(path, function)
        self.failed = self.worked = 0

    def __call__(self, completion: str, question: Question) -> bool:
        arguments = (question, completion) if self.shape == 2 else (completion, question.question, question.answer)
        try:
            verdict = limited(self.check, *arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's code may raise anything, SystemExit too: told with the place, never swallowed
            return self.wrong(question, f"raised {told(error, self.path)}", error)
        if type(verdict).__name__ in ("bool", "bool_"):  # bool_ is numpy's
            self.worked += 1
            return bool(verdict)
        if isinstance(verdict, Real) and 0 <= verdict <= 1:
            self.worked += 1
            return bool(verdict >= RIGHT)
        return self.wrong(question, f"returned {verdict!r}: return True, False or a number from 0 to 1")

    def wrong(self, question: Question, what: str, cause: BaseException | None = None) -> bool:
        self.failed += 1
        line = f"verifier {self.name} on {question.named} {what}"
        if self.failed >= ALL_FAILED and not self.worked:
            raise InputError(f"{line}; it failed on each of the first {self.failed} answers") from cause
        if self.failed <= SHOWN:
            more = " (further failures are counted as wrong too, and not shown)" if self.failed == SHOWN else ""
            console.print(f"{line}; counted as wrong{more}", markup=False, highlight=False, soft_wrap=True)
        return False


def own_function(path: Path, function: str) -> tuple[Callable[..., bool | float], int]:
    """The function and how many arguments it takes, 2 or 3. Raises InputError when it is not there or takes others."""
    if not path.is_file():
        raise InputError(f"no verifier file {path}: give it as my.py:check")
    check = getattr(own_module(path), function, None)
    if not callable(check):
        raise InputError(f"{path} has no function {function!r}: define {function}(question, completion) -> bool")
    for arguments in (("question", "completion"), ("response", "question", "answer")):
        try:
            inspect.signature(check).bind(*arguments)
        except TypeError:
            continue
        return check, len(arguments)
    raise InputError(f"{path}:{function} must take (question, completion), or (response, question, answer)")


def own_module(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"sbtiny_verifier_{path.stem}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # loading runs the user's code, which may also call sys.exit
        raise InputError(f"verifier file {path} does not load: {told(error, path)}") from error
    return module


def told(error: BaseException, path: Path) -> str:
    """An exception in one line: kind, message, and the line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":") + place
