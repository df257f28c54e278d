"""Read an adapter's folder. Imports no torch, so that a broken one is reported at once."""

import json
from pathlib import Path
from typing import Any

from sbtiny.errors import InputError

FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA. Raises InputError when a file is missing, corrupt or of another adapter."""
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no adapter ({name} is missing): give a finished run or its adapter folder")
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is corrupt ({error}): take one from a checkpoint-N of the run") from error
    numbers = ("r", "lora_alpha")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not all(_positive(config.get(key)) for key in numbers):
        raise InputError(f"{file} is corrupt (it describes no LoRA of a rank and an alpha): take one from a checkpoint-N of the run")
    return config


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
