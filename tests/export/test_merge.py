"""Bases and merged folders in several files, as with large models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sbtiny.cli.main import app
from sbtiny.errors import InputError
from sbtiny.export import merge
from sbtiny.export.compare import kl
from sbtiny.export.merge import Merged
from sbtiny.models.load import load_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(new_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files."""
    folder = new_model(tmp_path_factory.mktemp("sharded") / "base", "llama", False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(range(3, 60))])).logits[0].float()


def test_a_base_in_parts_is_merged_into_parts_with_their_index(
    sharded: Path, new_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "r", model=str(sharded))
    monkeypatch.setattr(merge, "SHARD", 200_000)
    app(["export", str(run), "--gguf", "q8_0", "--dtype", "float32", "--no-check", "-o", str(tmp_path / "out")], standalone_mode=False)
    folder = tmp_path / "out" / "merged"
    index = json.loads((folder / INDEX).read_text())
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    assert parts == [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    assert len(parts) > 2
    stored = {name: part for part in parts for name in names_in(folder / part)}
    assert index["weight_map"] == stored
    assert set(stored) == set(Merged(sharded, None).tensors)
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert kl(logits(load_model(str(sharded), adapter=run / "adapter")[0]), logits(load_model(str(folder))[0])) < 1e-9


def names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_a_base_that_lacks_a_part_is_one_line(sharded: Path, tmp_path: Path) -> None:
    base = shutil.copytree(sharded, tmp_path / "base")
    next(base.glob("model-00002-*")).unlink()
    with pytest.raises(InputError, match=r"cannot read .*model-00002-of-\d+\.safetensors: .*; check that the model is whole"):
        Merged(base, None)
    (base / INDEX).write_text("{}")
    with pytest.raises(InputError, match=r"index\.json is corrupt"):
        Merged(base, None)
