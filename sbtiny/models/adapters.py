"""What an adapter's folder says of itself. Imports no torch, so that a broken one is told of at once."""

import json
from pathlib import Path
from typing import Any

from sbtiny.errors import InputError

FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA. Raises InputError when a file is missing or it is none."""
    for file in FILES:
        if not (folder / file).is_file():
            raise InputError(f"{folder} holds no adapter ({file} is missing): give a finished run or its adapter folder")
    place = folder / "adapter_config.json"
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{place} is corrupt ({error}): take one from a checkpoint-N of the run") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA" or not all(_positive(found.get(key)) for key in ("r", "lora_alpha")):
        raise InputError(f"{place} is corrupt (it describes no LoRA of a rank and an alpha): take one from a checkpoint-N of the run")
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
