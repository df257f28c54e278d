"""Every architecture and kind, read back by transformers and, where it is installed, by llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sbtiny.errors import InputError
from sbtiny.export import gguf
from sbtiny.export.compare import agreement, kl
from sbtiny.models.gguf import read_gguf
from sbtiny.rollout.engines import llama_cpp
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import build_gguf_policy

IDS = list(range(3, 60))
# Twice to five times what was measured on a random model, whose logits spread far: f32 1e-5 in llama.cpp, which keeps keys and values in
# 16 bits, and 0 in transformers; f16 3e-5, bf16 1.5e-3, q8_0 1.5e-2, q5 0.26, q4 0.82.
NEAR = 3e-5
FAR = {"f32": NEAR, "f16": 1e-4, "bf16": 5e-3, "q8_0": 3e-2, "q5_1": 0.5, "q5_0": 0.5, "q4_1": 1.5, "q4_0": 1.5}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(input_ids=torch.tensor([IDS])).logits[0]


@pytest.fixture
def both_readers(llama_logits):
    """The logits of a file in transformers and, where it is installed, llama.cpp."""

    def read_by_both(file: Path) -> list[torch.Tensor]:
        found = [logits(read_gguf(file)[0])]
        return [*found, llama_logits(file, IDS)] if llama_cpp.is_available() else found

    return read_by_both


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_an_architecture_reads_back_exactly(new_model, write, both_readers, kind: str, tied: bool, tmp_path: Path) -> None:
    base = new_model(tmp_path / "base", kind, tied)
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    for found in both_readers(write(base, "f32", tmp_path / "x.gguf")):
        assert kl(wanted, found) < NEAR
        assert agreement(wanted, found) == 1


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_a_kind_is_as_near_as_its_bits(new_model, write, both_readers, kind: str, tmp_path: Path) -> None:
    base = new_model(tmp_path / "base", "llama", True)
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    for found in both_readers(write(base, kind, tmp_path / "x.gguf")):
        assert kl(wanted, found) < FAR[kind]


def test_what_cannot_be_written_is_refused_with_what_can() -> None:
    with pytest.raises(InputError, match=r"'gpt2' model: llama, qwen2, qwen3 work"):
        gguf.check_architecture(AutoConfig.for_model("gpt2"))


def test_the_rotary_layouts_pair_the_same_rows() -> None:
    rows = np.arange(8)[:, None]  # one head: halves 0-3 and 4-7
    assert gguf.interleave_rope_rows(rows, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs llama-cpp-python")
def test_llama_cpp_keeps_to_the_memory_it_is_given_and_writes_the_same(new_model, write, tmp_path: Path) -> None:
    base = new_model(tmp_path / "base", "qwen3", True)  # heads of 128 on a width of 64
    file = write(base, "f32", tmp_path / "x.gguf")
    wide = build_gguf_policy(file, slots=6)
    requests = [wide.request(f"{n} + 1?", 6, seed=n) for n in range(6)]
    expected = [e.completion_ids for e in wide.sample(requests, Sampling())]
    slot = 2 * 2 * 1 * 128 * llama_cpp.CACHE_ROUNDING * 2 / 2**30  # layers, keys and values, heads, their size, tokens, bytes
    narrow = build_gguf_policy(file, slots=6, kv_cache_gib=2.5 * slot)
    assert [e.completion_ids for e in narrow.sample(requests, Sampling())] == expected
    assert (wide.engine.rows, narrow.engine.rows) == (6, 2)
    with pytest.raises(InputError, match="raise --kv-memory"):
        narrow.engine.check_room(10_000)
