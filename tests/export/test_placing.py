"""Killed exports and full disks, for real: nothing under the final name, and the next export works."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import full_disk

from sbtiny.cli.main import app, main
from sbtiny.errors import InputError
from sbtiny.export import kquants
from sbtiny.rollout.engines import llama_cpp


def test_a_killed_export_leaves_nothing_under_its_name_and_the_next_one_works(run: Path, tmp_path: Path) -> None:
    out, building = tmp_path / "out", tmp_path / ".out.building"
    kinds = "f32,f16,q8_0,q5_1,q5_0,q4_1,q4_0"  # the check follows, so that it is never too late to kill
    command = [sys.executable, "-m", "sbtiny", "export", str(run), "-o", str(out), "--gguf", kinds]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not list(building.glob("*.gguf")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, stderr
    assert list(building.glob("*.gguf"))
    assert not out.exists()
    app(["export", str(run), "--gguf", "q8_0", "--no-check", "-o", str(out)], standalone_mode=False)
    assert json.loads((out / "export.json").read_text())["checked"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kinds", "most"),
    [("none", 1_000_000), ("f32", 3_000_000), ("q8_0", 1_000_000)],  # the merged folder takes 2.4 MB, f32 4.7 MB
)
def test_without_room_it_says_so_in_a_line_and_leaves_nothing(
    run: Path, kinds: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["sbtiny", "export", str(run), "--gguf", kinds, "--no-check", "-o", str(tmp_path / "out")])
    with full_disk(most), pytest.raises(SystemExit) as ended:
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert (ended.value.code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"error: cannot write {tmp_path / 'out'}, the disk is full or read-only: free space")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs llama-cpp-python")
def test_llama_cpp_without_room_is_not_a_model_it_cannot_make(run: Path, tmp_path: Path) -> None:
    app(["export", str(run), "--gguf", "f16", "--no-check", "-o", str(tmp_path / "out")], standalone_mode=False)
    whole = tmp_path / "out" / "r-f16.gguf"
    with full_disk(500_000), pytest.raises(OSError, match="No space left"):
        kquants.quantize(whole, tmp_path / "x.gguf", "q5_k_m")
    (tmp_path / "half.gguf").write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"llama\.cpp could not make q5_k_m: .*; another kind, such as q8_0"):
        kquants.quantize(tmp_path / "half.gguf", tmp_path / "x.gguf", "q5_k_m")
