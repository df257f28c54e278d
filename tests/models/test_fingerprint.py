"""Fingerprints of what answers: any change of base, precision, adapter or file gives another."""

import time
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.models import fingerprint
from sbtiny.models.fingerprint import file_fingerprint, policy_fingerprint


def adapter(folder: Path, weights: bytes, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(config)
    return folder


def test_every_part_counts(tmp_path: Path) -> None:
    a, b, c = (adapter(tmp_path / n, w, t) for n, w, t in (("a", b"1", "{}"), ("b", b"2", "{}"), ("c", b"1", '{"r": 1}')))
    found = [policy_fingerprint("base", False, place) for place in (a, b, c, None)]
    found += [policy_fingerprint("base", True, a), policy_fingerprint("other", False, a)]
    assert len(set(found)) == 6
    assert policy_fingerprint("base", False, adapter(tmp_path / "moved", b"1")) == found[0]


def test_a_large_file_is_read_in_samples_that_reach_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 10)
    monkeypatch.setattr(fingerprint, "BLOCKS", 8)
    file, content = tmp_path / "x.gguf", bytearray(5003)
    seen = set()
    for at in (None, 0, 2500, 5002):
        changed = bytearray(content)
        if at is not None:
            changed[at] = 1
        file.write_bytes(changed)
        seen.add(file_fingerprint(file))
    assert len(seen) == 4
    file.write_bytes(content[:-1])
    assert file_fingerprint(file) not in seen


def test_four_gigabytes_take_no_time(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    with file.open("wb") as opened:
        opened.truncate(4 << 30)  # sparse
    started = time.perf_counter()
    file_fingerprint(file)
    assert time.perf_counter() - started < 5


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*x\.gguf: No such file"):
        file_fingerprint(tmp_path / "x.gguf")
