"""`sbtiny export --calibrate`: each file's own calibration, by its own fingerprint; one line where llama.cpp is not there."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from sbtiny import runs
from sbtiny.budget.calibration_record import from_record
from sbtiny.cli.main import run as call
from sbtiny.export import calibrate
from sbtiny.models.fingerprint import file_fingerprint
from sbtiny.rollout.engines import llama_cpp


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_each_file_gets_its_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(calibrate, "QUESTIONS", 3)
    out = tmp_path / "out"
    line = ["export", str(run), "--gguf", "q8_0,q4_0", "--no-check", "--calibrate", "-o", str(out), "--set", "eval.max_tokens=20"]
    assert call(line, False) == 0
    found = {}
    for kind in ("q8_0", "q4_0"):
        record = runs.read_json(out / f"r-{kind}.calibration.json")
        found[kind] = from_record(record, kind)
        assert found[kind].model_fingerprint == file_fingerprint(out / f"r-{kind}.gguf")
        assert (found[kind].questions, found[kind].split) == (3, "val")
    assert found["q8_0"].model_fingerprint != found["q4_0"].model_fingerprint
    assert f"wrote {out / 'r-q8_0.calibration.json'}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("kinds", "why"), [("q8_0", "pip install 'sbtiny[llama]'"), ("none", "there is no GGUF file (--gguf)")])
def test_without_llama_cpp_or_a_file_it_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, kinds: str, why: str
) -> None:
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    out = tmp_path / "out"
    assert call(["export", str(run), "--gguf", kinds, "--no-check", "--calibrate", "-o", str(out)], False) == 0
    assert f"not calibrated: {why}" in " ".join(capsys.readouterr().err.split())
    assert not list(out.glob("*.calibration.json"))
