"""K-quants (q4_k_m and the like), which only llama.cpp makes: found before any work, run on a float16 file of ours."""

import ctypes
import errno
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from sbtiny.errors import InputError

KINDS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # name -> llama.cpp's number
TOOL = "llama-quantize"


def check_tool() -> None:
    """Raises InputError, with the line that mends it, when neither the Python module nor the program is there."""
    if not find_spec("llama_cpp") and not shutil.which(TOOL):
        raise InputError(f"{', '.join(KINDS)} are made by llama.cpp: pip install 'sbtiny[llama]', or put {TOOL} on PATH")


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `target` from a float16 GGUF. Raises InputError with what llama.cpp said, OSError when there was no room."""
    if find_spec("llama_cpp"):
        _with_module(source, target, kind)
    else:
        done = subprocess.run([TOOL, source, target, kind.upper()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise failure(TOOL, kind, done.stderr)


def _with_module(source: Path, target: Path, kind: str) -> None:
    import llama_cpp

    said: list[str] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = KINDS[kind]
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)  # `log` goes with this frame
    if code:
        raise failure("llama.cpp", kind, "".join(said))


def failure(program: str, kind: str, said: str) -> Exception:
    """What to raise for a program that failed and said so much."""
    if "iostream error" in said:  # all that C++ tells of a disk that took no more
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = (said.strip().splitlines() or ["nothing"])[-1].rpartition("failed to quantize: ")[2]
    return InputError(f"{program} could not make {kind}: {last}; another kind, such as q8_0, needs no llama.cpp")
