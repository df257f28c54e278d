"""K-quants such as q4_k_m. Only llama.cpp makes them, from our float16 file; the tool is looked for before any work."""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from sbtiny.disk import disk_full_error, is_disk_full
from sbtiny.errors import InputError

KINDS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # name -> llama.cpp's number
TOOL = "llama-quantize"


def check_tool() -> None:
    """Raises InputError with the remedy when neither the Python module nor the program is installed."""
    if not find_spec("llama_cpp") and not shutil.which(TOOL):
        raise InputError(f"{', '.join(KINDS)} are made by llama.cpp: pip install 'sbtiny[llama]', or put {TOOL} on PATH")


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `target` from a float16 GGUF. Raises InputError with llama.cpp's last line, OSError on a full disk."""
    if find_spec("llama_cpp"):
        _with_module(source, target, kind)
    else:
        done = subprocess.run([TOOL, source, target, kind.upper()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise failure(TOOL, kind, done.stderr)


def _with_module(source: Path, target: Path, kind: str) -> None:
    import llama_cpp

    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = KINDS[kind]
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)  # `callback` is freed with this frame
    if code:
        raise failure("llama.cpp", kind, "".join(lines))


def failure(program: str, kind: str, log: str) -> Exception:
    """The error to raise for a program that failed with this log."""
    if is_disk_full(RuntimeError(log)):
        return disk_full_error()
    last = (log.strip().splitlines() or ["nothing"])[-1].rpartition("failed to quantize: ")[2]
    return InputError(f"{program} could not make {kind}: {last}; another kind, such as q8_0, needs no llama.cpp")
