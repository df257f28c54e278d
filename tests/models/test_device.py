"""Devices and dtypes."""

import math
from pathlib import Path

import pytest
import torch

from sbtiny.models import device as hardware
from sbtiny.models.device import Hardware, cpu_flags, cpu_name, detect_device, pick_dtype, probe_device, read_cgroup
from sbtiny.rollout.memory import free_bytes

XEON = "processor: 0\nmodel name\t: Xeon 8481C\nflags\t\t: fpu avx512f amx_bf16\n\nprocessor: 1\nflags\t: fpu\n"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_gpus_compute_in_bfloat16_from_ampere_on(capability: tuple[int, int], dtype: str) -> None:
    assert pick_dtype("cuda", None, capability) == dtype
    assert pick_dtype("cuda", 1_000_000, capability) == dtype


@pytest.mark.parametrize(
    ("parameters", "cpu_bf16", "dtype"),
    [
        (1_000_000, True, "float32"),
        (49_999_999, True, "float32"),
        (50_000_000, True, "bfloat16"),
        (135_000_000, True, "bfloat16"),
        (135_000_000, False, "float32"),
        (None, True, "bfloat16"),
        (None, False, "float32"),
    ],
)
def test_cpus_use_bfloat16_for_large_models_if_they_can(parameters: int | None, cpu_bf16: bool, dtype: str) -> None:
    assert pick_dtype("cpu", parameters, cpu_bf16=cpu_bf16) == dtype


def test_cpuinfo_is_read_and_may_be_missing() -> None:
    assert cpu_flags(XEON) == {"fpu", "avx512f", "amx_bf16"}
    assert cpu_name(XEON) == "Xeon 8481C"
    assert cpu_flags("") == set()
    assert cpu_name("") != ""


def test_detect_describes_this_machine() -> None:
    found = detect_device()
    assert isinstance(found, Hardware)
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.name
    assert found.memory_gb > 0.5
    if found.device == "cpu":
        assert detect_device(1_000_000).dtype == "float32"


@pytest.mark.parametrize(
    ("script", "device", "smi_error"),
    [
        ("exec sleep 30", "cpu", "no answer in 0.5 s"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "cpu", "code 18: Failed to initialize NVML"),
        ("echo 'RTX 4090, 24564, 23028, 8.9, 560.35'", "cuda", ""),
    ],
)
def test_a_driver_that_hangs_or_fails_is_no_gpu_and_says_why(
    script: str, device: str, smi_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "NVIDIA_SMI_TIMEOUT_S", 0.5)
    found = probe_device()
    assert found.device == device
    assert found.nvidia_smi_error.startswith(smi_error)
    assert bool(found.nvidia_smi_error) == bool(smi_error)


@pytest.mark.parametrize(
    ("visible", "name"), [(None, "all"), ("1", "only 1"), ("1,0", "only 1"), ("GPU-5a", "only GPU-5a"), ("", None), ("-1", None)]
)
def test_the_gpu_is_the_first_that_cuda_may_see(
    visible: str | None, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = -i ] && who="only $4" || who=all\necho "$who, 24564, 23028, 8.9, 560.35"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = probe_device()
    assert (found.name if found.device == "cuda" else None) == name


LIMITED = {"memory.max": "2147483648\n", "memory.current": "1073741824\n", "memory.stat": "anon 5\ninactive_file 1048576\n"}
OLDER = {
    "memory/memory.limit_in_bytes": "1073741824\n",
    "memory/memory.usage_in_bytes": "1073741000\n",
    "memory/memory.stat": "inactive_file 3\ntotal_inactive_file 176\n",
}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (LIMITED, (2**31, 2**30 + 2**20)),
        (OLDER, (2**30, 1000)),
        (LIMITED | {"memory.current": "2147483999\n", "memory.stat": ""}, (2**31, 0)),
        (LIMITED | {"memory.max": "max\n"}, (math.inf, math.inf)),
        ({}, (math.inf, math.inf)),
    ],
)
def test_a_container_has_no_more_than_its_limit(files: dict[str, str], found: tuple[float, float], tmp_path: Path, monkeypatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_cgroup(tmp_path) == found
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert probe_device().memory_gb == detect_device().memory_gb <= found[0] / 2**30
    assert free_bytes(torch.device("cpu")) <= found[1]
