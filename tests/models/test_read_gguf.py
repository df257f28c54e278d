"""Tokenizers from GGUF files, and the cache of unpacked models."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sbtiny.errors import InputError
from sbtiny.models import gguf as from_gguf
from sbtiny.models.aliases import BUNDLED, resolve
from sbtiny.models.load import load_model

gguf = pytest.importorskip("gguf")

TEXTS = [
    "What is 123+4567?\n\nx=12, y = 1024.5; isn't it?",
    "<budget>120</budget><solution>Tom has 33 coins. a)-8=25\n</solution>",
    "  leading and   inner spaces\t\ttabs  ",
    "日本語 é ñ 😀 ½",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def write_gguf(file: Path, **changes: Any) -> Path:
    """The bundled tokenizer as fields of a GGUF file with one weight; `changes` replace fields, None leaves one out."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    merges = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]["merges"]
    added = tokenizer.added_tokens_decoder
    fields = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "llama-bpe",
        "token_list": tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
        "token_merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "token_types": [3 if i in added else 1 for i in range(len(tokenizer))],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template": tokenizer.chat_template,
        "rope_scaling_type": None,
    }
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (fields | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tokenizer_of(file: Path) -> PreTrainedTokenizerBase:
    return from_gguf.tokenizer_from_gguf(gguf.GGUFReader(file), file)


def test_the_bundled_tokenizer_survives_gguf(tmp_path: Path) -> None:
    there, back = AutoTokenizer.from_pretrained(BUNDLED), tokenizer_of(write_gguf(tmp_path / "tiny.gguf"))
    for text in TEXTS:
        assert back.encode(text, add_special_tokens=False) == there.encode(text, add_special_tokens=False)
    assert (back.eos_token, back.pad_token, back.bos_token) == (there.eos_token, there.pad_token, None)
    assert back.chat_template == there.chat_template
    special = {i for i, token in back.added_tokens_decoder.items() if token.special}
    assert special == {i for i, token in there.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_pre": "tekken"}, "split 'tekken'"),
        ({"tokenizer_pre": None}, "split None"),
        ({"tokenizer_model": "llama"}, "a 'llama' tokenizer"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "scaled rotary positions"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = write_gguf(tmp_path / "odd.gguf", **changes)
    with pytest.raises(InputError, match=reason) as error:
        load_model(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to be read as a header"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not a readable GGUF file"):
        load_model(str(file))


def test_without_the_gguf_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(InputError, match=r"pip install 'sbtiny\[gguf\]'"):
        load_model(str(tmp_path / "x.gguf"))


def test_smollm2_is_unpacked_once_and_again_when_it_changes(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Path(resolve(smollm2).ref)
    first = from_gguf.unpack_gguf(packed)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert from_gguf.unpack_gguf(packed) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert not [path for path in first.parent.iterdir() if path.name.startswith("tmp")]

    calls: list[Path] = []
    monkeypatch.setattr(from_gguf, "read_gguf", lambda file: calls.append(file) or (Saved(), Saved()))
    other = tmp_path / packed.name
    other.write_bytes(b"")
    there = from_gguf.unpack_gguf(other)
    os.utime(other, ns=(1, 1))
    assert len({first, there, from_gguf.unpack_gguf(other)}) == 3
    assert calls == [other, other]


class Saved:
    """A stand-in for model and tokenizer that only saves."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)


def test_smollm2_splits_digits_and_keeps_its_special_tokens(smollm2: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(from_gguf.unpack_gguf(Path(resolve(smollm2).ref)))
    assert tokenizer.tokenize("123 45") == ["1", "2", "3", "Ġ", "4", "5"]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_full_or_forbidden_cache_is_one_line(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SBTINY_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(from_gguf, "read_gguf", lambda file: (Saved(), Saved()))
    with pytest.raises(InputError, match="free space or set SBTINY_CACHE"):
        from_gguf.unpack_gguf(Path(resolve(smollm2).ref))
