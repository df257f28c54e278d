"""A verifier of the user's own: a function `check(response, question, answer) -> bool` in a Python file."""

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from sbtiny.errors import InputError
from sbtiny.tasks.sources import Question


def own_verifier(path: Path, function: str) -> Callable[[str, Question], bool]:
    """The user's function as a verifier; what goes wrong inside is an InputError with file, question and reason."""
    check = own_function(path, function)

    def verifier(response: str, question: Question) -> bool:
        where = f"verifier {path}:{function} on question {question.id}"
        try:
            verdict = check(response, question.question, question.answer)
        except Exception as error:  # the user's code may raise anything: said again with the place, never swallowed
            raise InputError(f"{where} raised {told(error, path)}") from error
        if type(verdict).__name__ not in ("bool", "bool_"):  # bool_ is numpy's
            raise InputError(f"{where} returned {verdict!r}: return True or False")
        return bool(verdict)

    return verifier


def own_function(path: Path, function: str) -> Callable[[str, str, str], bool]:
    if not path.is_file():
        raise InputError(f"no verifier file {path}: give it as my.py:check")
    check = getattr(own_module(path), function, None)
    if not callable(check):
        raise InputError(f"{path} has no function {function!r}: define {function}(response, question, answer) -> bool")
    try:
        inspect.signature(check).bind("response", "question", "answer")
    except TypeError as error:
        raise InputError(f"{path}:{function} must take (response, question, answer): {error}") from error
    return check


def own_module(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"sbtiny_verifier_{path.stem}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # loading runs the user's code
        raise InputError(f"verifier file {path} does not load: {told(error, path)}") from error
    return module


def told(error: Exception, path: Path) -> str:
    """An exception in one line: kind, message, and the line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place
