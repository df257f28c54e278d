"""`make gpu-check`: the presets on a GPU, on random weights of the shape they are meant for; and a rehearsal of it without one.

Nothing here needs a network. With fewer gigabytes than a card of the preset has, its check is left out.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sbtiny.models.aliases import BUNDLED
from sbtiny.models.shapes import SHAPES, Shape

CAPS = {"t4": 15, "rtx4090": 24}  # GiB of the cards
REHEARSAL = replace(SHAPES["qwen-1.5b"], layers=2, width=64, feed_forward=96, heads=4, kv_heads=2, head_dim=16)
BACKENDS = ["transformers", pytest.param("unsloth", marks=pytest.mark.skipif(not find_spec("unsloth"), reason="no unsloth"))]


def random_model(folder: Path, shape: Shape) -> Path:
    """A Qwen2 model of this shape in 16 bits, with the bundled model's tokenizer: its ids are a part of the vocabulary."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131_072,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=json.loads((BUNDLED / "config.json").read_text())["eos_token_id"],
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    for file in BUNDLED.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = SHAPES["qwen-1.5b"] if torch.cuda.is_available() else REHEARSAL
    return random_model(tmp_path_factory.mktemp("random"), shape)


def measured(model: Path, folder: Path, preset: str, stage: str, backend: str) -> dict:
    """What tests/gpu/measure.py says of a stage; it is printed too."""
    command = [sys.executable, Path(__file__).with_name("measure.py"), model, folder, preset, stage, backend, CAPS[preset]]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", CAPS)
def test_a_preset_trains_within_its_card(preset: str, backend: str, model: Path, tmp_path: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if total < CAPS[preset] - 2:
        pytest.skip(f"{total:.0f} GiB here, {preset} wants {CAPS[preset]}")
    for stage in ("sft", "grpo"):
        found = measured(model, tmp_path, preset, stage, backend)
        assert found["peak_gb"] <= CAPS[preset]
        assert found["finite"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the check itself runs")
def test_the_check_runs_through_on_a_processor(model: Path, tmp_path: Path) -> None:
    for stage in ("sft", "grpo"):
        found = measured(model, tmp_path, "t4", stage, "transformers")
        assert found["finite"]
        assert 0 < found["peak_gb"] <= CAPS["t4"]
        assert found["plan_gb"] > 0
