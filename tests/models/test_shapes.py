"""Shapes give the parameter counts of the aliases and of a built model."""

import json
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.models.aliases import ALIASES, Alias
from sbtiny.models.shapes import SHAPES, shape_of


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_a_shape_adds_up_to_the_parameters_of_its_alias(alias: Alias) -> None:
    assert shape_of(alias.name).parameters == alias.parameters


def test_a_folder_tells_its_shape_as_its_weights_do(small: Path) -> None:
    from sbtiny.models.load import add_lora, load_model

    model, _ = load_model(str(small))
    shape = shape_of(str(small))
    assert shape.parameters == model.num_parameters()
    trained = sum(p.numel() for p in add_lora(model, rank=4).parameters() if p.requires_grad)
    assert shape.lora(4) == trained


def test_a_hub_id_of_an_alias_is_known_and_another_is_not() -> None:
    assert shape_of("Qwen/Qwen3-1.7B") == SHAPES["qwen3-1.7b"]
    with pytest.raises(InputError, match="shape of org/model is not known"):
        shape_of("org/model")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot read"), ('{"model_type": "gpt2"}', "'gpt2' model"), ('{"model_type": "llama"}', "num_attention_heads")],
)
def test_a_folder_that_is_no_such_model_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        shape_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_config_without_the_newer_keys_has_a_head_of_keys_a_head(tmp_path: Path) -> None:
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    config = {"model_type": "llama"} | dict(zip(keys, (2, 64, 128, 4, 100), strict=True))
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (4, 16, False)
