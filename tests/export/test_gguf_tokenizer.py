"""Tokenizers that llama.cpp reads otherwise than transformers: compensated, or refused before any work."""

import json
from pathlib import Path
from unicodedata import normalize

import pytest
from gguf import GGUFReader
from tokenizers import normalizers, pre_tokenizers

from sbtiny.cli.main import app
from sbtiny.errors import InputError
from sbtiny.export.gguf_tokenizer import composes_nfc
from sbtiny.export.strings import STRINGS
from sbtiny.models.gguf import tokenizer_from_gguf
from sbtiny.rollout.engines import llama_cpp

FEW = ["--questions", "4", "--set", "eval.max_tokens=40", "--set", "eval.max_num_seqs=4"]
DECOMPOSED = "cafe\u0301 25 + 4"  # the accent is a character of its own


def export(run: Path, *arguments: str) -> None:
    app(["export", str(run), *arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def qwen(new_model, new_run, new_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a small Qwen2 with a tokenizer that composes."""
    folder = tmp_path_factory.mktemp("qwen")
    return new_run(folder / "r", model=str(new_model(folder / "base", "qwen2", True, new_tokenizer())))


def test_a_tokenizer_that_composes_is_exported_and_the_readme_says_what_llama_cpp_leaves_out(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(qwen, "--gguf", "f32", "--dtype", "float32", "-o", str(out), *FEW)
    found = json.loads((out / "export.json").read_text())
    assert found["passed"], found["failures"]
    assert 'unicodedata.normalize("NFC", text)' in (out / "README.md").read_text()
    assert found["files"]["r-f32.gguf"]["transformers"]["strings_same"] == len(STRINGS)
    if llama_cpp.is_available():
        measured = found["files"]["r-f32.gguf"]["llama_cpp"]
        assert (measured["strings_same"], measured["strings_composed_first"]) == (len(STRINGS), 1)
        engine = llama_cpp.LlamaCppEngine(out / "r-f32.gguf", slots=2)
        tokenizer = tokenizer_from_gguf(GGUFReader(out / "r-f32.gguf"), out / "r-f32.gguf")
        ids = tokenizer.encode(DECOMPOSED, add_special_tokens=False)
        assert engine.tokenize(normalize("NFC", DECOMPOSED)) == ids != engine.tokenize(DECOMPOSED)
        engine.close()


def test_a_qwen_split_without_composing_is_read_back_without(new_model, new_run, new_tokenizer, tmp_path: Path) -> None:
    tokenizer = new_tokenizer(normalizer=normalizers.Sequence([]))  # qwen3: transformers has every tokenizer of a qwen2 model compose
    run = new_run(tmp_path / "r", model=str(new_model(tmp_path / "base", "qwen3", True, tokenizer)))
    export(run, "--gguf", "f32", "--no-check", "-o", str(tmp_path / "out"))
    back = tokenizer_from_gguf(GGUFReader(tmp_path / "out" / "r-f32.gguf"), tmp_path / "out" / "r-f32.gguf")
    assert [back.encode(text) for text in STRINGS] == [tokenizer.encode(text) for text in STRINGS]
    assert "NFC" not in (tmp_path / "out" / "README.md").read_text()


def test_what_llama_cpp_would_read_otherwise_is_refused_with_what_works(new_model, new_run, new_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reads 'Hello, world!' as 'hello, world!', and llama.cpp does not"):
        composes_nfc(new_tokenizer(normalizer=normalizers.Lowercase()))
    odd = new_tokenizer(split=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    run = new_run(tmp_path / "r", model=str(new_model(tmp_path / "base", "llama", True, odd)))
    with pytest.raises(InputError, match="cuts text as none of llama-bpe, qwen2, deepseek-r1-qwen, smollm, gpt-2 does"):
        export(run, "--gguf", "q8_0", "-o", str(tmp_path / "out"), *FEW)
    assert not list(tmp_path.glob("*out*"))
