"""K-quants from llama.cpp's module, or from its program on PATH where the module is missing."""

import json
from pathlib import Path

import pytest
from gguf import GGUFReader

from sbtiny.cli.main import app
from sbtiny.errors import InputError
from sbtiny.export import kquants
from sbtiny.export.compare import kl
from sbtiny.rollout.engines import llama_cpp

STUB = """#!/bin/sh
printf '%s\\n' "$@" > "$(dirname "$0")/arguments"
cp "$1" "$2"
"""
FAILING = """#!/bin/sh
echo "main: failed to quantize: no such type" >&2
exit 1
"""


needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_available(), reason="needs llama-cpp-python")
IDS = list(range(3, 60))
FAR = {"q4_k_m": 2e-3, "q5_k_m": 8e-4, "q6_k": 3e-4}  # KL in nats, three times what was measured


def export(*arguments: object) -> None:
    app(["export", *map(str, arguments)], standalone_mode=False)


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "number", "stored"), [("q4_k_m", 15, "Q4_K"), ("q5_k_m", 17, "Q5_K"), ("q6_k", 18, "Q6_K")])
def test_a_k_quant_is_of_its_kind_and_near_the_model(
    new_model, write, llama_logits, kind: str, number: int, stored: str, tmp_path: Path
) -> None:
    calm = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "initializer_range": 0.02}  # blocks of 256 weights
    base = new_model(tmp_path / "base", "llama", True, **calm)
    kquants.quantize(write(base, "f16", tmp_path / "f16.gguf"), tmp_path / "x.gguf", kind)
    file = GGUFReader(tmp_path / "x.gguf")
    assert file.get_field("general.file_type").contents() == number
    assert stored in {tensor.tensor_type.name for tensor in file.tensors}
    wanted, found = (llama_logits(tmp_path / name, IDS) for name in ("f16.gguf", "x.gguf"))
    assert 1e-9 < kl(wanted, found) < FAR[kind]


@needs_llama_cpp
def test_a_run_as_a_k_quant_passes_its_check(run: Path, tmp_path: Path) -> None:
    few = ["--questions", "4", "--set", "eval.max_tokens=60", "--set", "eval.max_num_seqs=4"]
    export(run, "--gguf", "q5_k_m,q6_k", "-o", tmp_path / "out", *few)
    assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == {"r-q5_k_m.gguf", "r-q6_k.gguf"}  # no float16 left over
    assert json.loads((tmp_path / "out" / "export.json").read_text())["passed"] is True


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a llama-quantize on PATH, hide the module, and return the folder."""

    def put(text: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "llama-quantize").write_text(text)
        (folder / "llama-quantize").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setattr(kquants, "find_spec", lambda name: None)
        return folder

    return put


def test_the_program_on_path_is_used_where_the_module_lacks(run: Path, program, tmp_path: Path) -> None:
    folder = program(STUB)
    export(run, "--gguf", "q5_k_m", "--no-check", "-o", tmp_path / "out")
    source, target, kind = (folder / "arguments").read_text().splitlines()
    assert (Path(source).name, Path(target).name, kind) == ("r-f16.gguf", "r-q5_k_m.gguf", "Q5_K_M")
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["r-q5_k_m.gguf"]


def test_a_program_that_fails_is_one_line_and_nothing_is_left(run: Path, program, tmp_path: Path) -> None:
    program(FAILING)
    with pytest.raises(InputError, match="llama-quantize could not make q4_k_m: no such type; another kind, such as q8_0"):
        export(run, "--gguf", "q4_k_m", "--no-check", "-o", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
