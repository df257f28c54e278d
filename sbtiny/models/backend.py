"""Choose the library that loads and trains: unsloth or transformers."""

import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch

from sbtiny.config import BackendName
from sbtiny.errors import InputError
from sbtiny.models.gguf import cache_folder
from sbtiny.progress import console


def start_backend(backend: BackendName = "auto") -> Literal["transformers", "unsloth"]:
    """Choose the library, and import unsloth if it is chosen. `auto` takes unsloth on a CUDA GPU, where it can be imported.

    Call this before trl, transformers or peft are imported, because unsloth patches them. Afterwards `auto` takes transformers.
    Raises InputError when `unsloth` is set and cannot run.
    """
    if backend == "transformers" or (backend == "auto" and not torch.cuda.is_available()):
        return "transformers"
    blocker = _unsloth_blocker() or _import_unsloth(tell=backend == "auto")
    if blocker is None:
        return "unsloth"
    if backend == "unsloth":
        raise InputError(f"{blocker[0]}: {blocker[1]}, or use --backend transformers")
    return "transformers"


def _unsloth_blocker() -> tuple[str, str] | None:
    """Why unsloth cannot run here, and the remedy; None if it can."""
    if "unsloth" not in sys.modules and not find_spec("unsloth"):
        return "unsloth is not installed", "pip install 'sbtiny[unsloth]'"
    if "unsloth" not in sys.modules and (before := _already_imported()):
        return f"unsloth must be imported before {before}", "call start_backend first"
    return None


def _already_imported() -> str:
    """Names of the libraries that unsloth patches and that are imported already."""
    return ", ".join(name for name in ("trl", "transformers", "peft") if name in sys.modules)


def _import_unsloth(tell: bool) -> tuple[str, str] | None:
    """Import unsloth. Returns reason and remedy where its version does not fit the others; `tell`: prints them in one line."""
    # By default its compiled code goes into the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    try:
        with redirect_stdout(sys.stderr):  # it greets; stdout is for results
            import_module("unsloth")
    except Exception as error:  # its import checks versions and GPUs, and raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if before := _already_imported():  # they may be patched by half
            raise InputError(f"unsloth fails in its import, after {before} ({reason}): use --backend transformers") from error
        if tell:
            line = f"unsloth cannot be used here ({reason}); sbtiny doctor compares the versions"
            console.print(line, markup=False, soft_wrap=True, style="yellow")
        return f"unsloth does not import ({reason})", "install the versions that sbtiny doctor names"
    return None
