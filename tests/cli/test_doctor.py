"""The doctor: what it compares, what it finds wrong, and that what it says can be read by machines."""

from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.cli import doctor
from sbtiny.cli.doctor import OPTIONAL, check_extras, compare_version, read_tested_versions, run_checks, to_record
from sbtiny.errors import InputError
from sbtiny.models.device import DeviceInfo

CPU = DeviceInfo("cpu", "a processor", 24.0, 20.0)
GPU = DeviceInfo("cuda", "RTX 4090", 24.0, 23.0, (8, 9), driver="560.35")


def test_the_tested_set_is_shipped_and_names_the_optional_packages() -> None:
    assert read_tested_versions().keys() > OPTIONAL


@pytest.mark.parametrize(
    ("package", "found", "state", "said", "mend"),
    [
        ("torch", "2.13.0+cu130", "ok", "2.13.0+cu130", ""),
        ("torch", "2.13.1", "ok", "2.13.1 (tested: 2.13.0)", ""),
        ("trl", "1.16.0", "note", "1.16.0 (tested: 1.15.0)", "pip install 'trl==1.15.0'"),
        ("trl", None, "bad", "not installed", "pip install 'trl==1.15.0'"),
        ("unsloth", None, "note", "not installed", ""),
    ],
)
def test_a_version_is_compared_with_the_tested_one(package: str, found: str | None, state: str, said: str, mend: str) -> None:
    finding = compare_version(package, read_tested_versions()[package], found)
    assert (finding.state, finding.found, finding.mend) == (state, said, mend)


def test_a_missing_extra_says_what_it_would_bring_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    here, there = ({f.name: f for f in check_extras(seen)} for seen in (CPU, GPU))
    assert there["unsloth"].mend == "pip install 'sbtiny[unsloth]'"
    assert here["unsloth"].mend == "no gain without an NVIDIA GPU, where only --backend unsloth takes it"
    assert here["tasks"].found == "missing: LaTeX answers compared as mathematics"
    assert all(f.state == "note" and f.mend for f in here.values())


def test_a_gpu_that_torch_cannot_use_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    first, *_, found = doctor.check_device(GPU)
    assert first.found == "RTX 4090, driver 560.35, capability 8.9"
    assert (found.name, found.state) == ("cuda", "bad")
    assert "CUDA build of torch" in found.mend
    assert "cuda" not in {f.name for f in doctor.check_device(CPU)}


def test_a_driver_that_does_not_answer_is_said() -> None:
    found = doctor.check_device(replace(CPU, nvidia_smi_error="no answer in 20 s"))[-1]
    assert (found.name, found.state, found.found) == ("nvidia-smi", "note", "no answer in 20 s")
    assert "nvidia-smi" not in {f.name for f in doctor.check_device(CPU)}


def test_a_folder_that_cannot_be_written_is_bad_and_the_report_says_not_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert to_record(run_checks(tmp_path))["folders"]["runs"]["state"] == "ok"
    assert list(tmp_path.iterdir()) == []

    def refuse(path: Path) -> None:
        raise InputError(f"cannot write {path}: Read-only file system; free space or write elsewhere")

    monkeypatch.setattr(doctor.runs, "check_writable", refuse)
    found = to_record(run_checks(tmp_path))
    assert not found["ok"]
    assert "Read-only" in found["folders"]["runs"]["found"]


def test_a_full_disk_is_worth_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 10**9)
    found = doctor.check_disk(tmp_path)
    assert {f.state for f in found} == {"note"}
    assert {f.name for f in found} == {"here", "unpacked models", "downloads"}
