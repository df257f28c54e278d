"""Scaled rotary positions and biases: llama.cpp computes what transformers does, or the file is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sbtiny.cli.main import app
from sbtiny.errors import InputError
from sbtiny.export import gguf, result_table
from sbtiny.export.compare import kl
from sbtiny.models.gguf import read_gguf
from sbtiny.rollout.engines import llama_cpp

IDS = list(range(3, 60))
NEAR = 1e-4  # three times what was measured; leaving out a setting gives 0.1 and more
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
SPREAD = {"mscale": 2.0, "mscale_all_dim": 0.5}
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_available(), reason="needs llama-cpp-python")


def logits(base: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(base)(input_ids=torch.tensor([IDS])).logits[0]


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", LINEAR), ("llama", LLAMA3), ("llama", YARN | {"factor": None}), ("qwen2", YARN), ("qwen3", YARN),
        ("llama", YARN | {"attention_factor": 1.5}), ("qwen2", YARN | SPREAD), ("qwen3", YARN | {"beta_fast": 32, "beta_slow": 1.0}),
    ],
)  # fmt: skip
def test_scaled_rotary_positions_are_llama_cpps_too(new_model, write, llama_logits, kind: str, rope: dict, tmp_path: Path) -> None:
    base = new_model(tmp_path / "base", kind, True, rope_parameters=rope)
    assert kl(logits(base), llama_logits(write(base, "f32", tmp_path / "x.gguf"), IDS)) < NEAR


@needs_llama_cpp
@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llamas_biases_are_written_and_transformers_which_drops_them_is_not_asked(
    new_model, write, llama_logits, bias: str, tmp_path: Path
) -> None:
    base = new_model(tmp_path / "base", "llama", True, **{bias: True})
    file = write(base, "f32", tmp_path / "x.gguf")
    assert kl(logits(base), llama_logits(file, IDS)) < NEAR
    with pytest.raises(InputError, match="has biases, which transformers drops from a GGUF"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", YARN | {"beta_fast": 16}, "with beta_fast = 16: llama.cpp always takes 32"),
        ("qwen2", YARN | {"beta_slow": 2.0}, "with beta_slow = 2.0: llama.cpp always takes 1"),
        ("qwen3", YARN | {"truncate": False}, "with truncate = False: llama.cpp always takes True"),
        ("qwen2", LLAMA3, "no GGUF for 'llama3' rotary scaling in a 'qwen2' model"),
        ("llama", LINEAR | {"partial_rotary_factor": 0.5}, r"a partial_rotary_factor of 0\.5"),
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "no GGUF for 'dynamic' rotary scaling: default, linear"),
    ],
)
def test_scaling_that_llama_cpp_computes_otherwise_is_refused(kind: str, changes: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        gguf.check_architecture(AutoConfig.for_model(kind, rope_parameters=changes))


def test_a_qwen3_with_biases_is_refused() -> None:
    with pytest.raises(InputError, match=r"with attention_bias: llama\.cpp has no bias for its o_proj"):
        gguf.check_architecture(AutoConfig.for_model("qwen3", attention_bias=True))


@pytest.fixture(scope="module")
def scaled(new_model, new_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a model that scales its rotary positions."""
    folder = tmp_path_factory.mktemp("scaled")
    return new_run(folder / "r", model=str(new_model(folder / "base", "llama", True, rope_parameters=YARN | SPREAD)))


def exported(run: Path, out: Path) -> dict:
    few = ["--questions", "4", "--set", "eval.max_tokens=40", "--set", "eval.max_num_seqs=4"]
    app(["export", str(run), "--gguf", "f32", "--dtype", "float32", "-o", str(out), *few], standalone_mode=False)
    return json.loads((out / "export.json").read_text())


@needs_llama_cpp
def test_a_run_with_scaled_positions_is_checked_through_llama_cpp(scaled: Path, tmp_path: Path) -> None:
    found = exported(scaled, tmp_path / "out")
    assert found["passed"] is True
    assert found["files"]["r-f32.gguf"]["transformers"] is None
    assert found["files"]["r-f32.gguf"]["llama_cpp"]["kl"] < NEAR


def test_a_file_that_nothing_here_reads_has_not_passed(scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    found = exported(scaled, tmp_path / "out")
    assert (found["checked"], found["passed"], found["failures"]) == (True, None, [])
    assert found["files"]["r-f32.gguf"]["checked"] is False
    assert found["not_checked"] == [
        "r-f32.gguf has scaled rotary positions, which only llama.cpp reads: pip install 'sbtiny[llama]' and export again"
    ]
    assert f"not checked: {found['not_checked'][0]}" in capsys.readouterr().err
    assert [name for name, _ in result_table.table_rows(found)] == ["trained policy", "merged", "f32 not checked"]
