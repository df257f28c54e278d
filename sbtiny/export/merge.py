"""Merge the adapter into the base, one tensor in memory at a time.

`dequantized` merges onto the base as training rounded it, to 16 or 4 bits, and is exactly the trained policy. `original` merges onto
the published weights. Never round to 4 bits after merging: it erases the adapter.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sbtiny.errors import InputError
from sbtiny.models.adapters import read_adapter_config
from sbtiny.models.tensor_faults import HEAD
from sbtiny.models.tensors import INDEX, read_tensors

SHARD = 10**9  # bytes
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
PLAIN_LORA = {"bias": "none", "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}


@dataclass(frozen=True, slots=True)
class Lora:
    """The change to one weight (out, in): scale x b @ a; a (rank, in), b (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())


def read_adapter(folder: Path) -> dict[str, Lora]:
    """Weight name -> Lora. Raises InputError when the adapter is missing, corrupt, or no plain LoRA."""
    config = read_adapter_config(folder)
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"the adapter in {folder} is corrupt ({error}): take one from a checkpoint-N of the run") from error
    for key, wanted in PLAIN_LORA.items():
        if (config.get(key) or wanted) != wanted:
            raise InputError(f"the adapter in {folder} has {key} = {config[key]!r}: only plain LoRA can be merged")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    names = sorted({name.removesuffix(A).removesuffix(B) for name in tensors})
    if odd := [name for name in names if not {name + A, name + B} <= tensors.keys()]:
        raise InputError(f"the adapter in {folder} holds half of {odd[0]}: take one from a checkpoint-N of the run")
    return {name.removeprefix(PREFIX) + ".weight": Lora(tensors[name + A], tensors[name + B], scale) for name in names}


class Merged:
    """The policy's tensors by Hugging Face name, float32. Each is read and merged on access; `tensors` has shapes and files.

    The base is first rounded as in training: to `dtype` (None: as stored), and with `nf4` the linear layers to 4 bits. `adapter` None:
    the base alone. Raises InputError when the base has no safetensors or the adapter does not fit it.
    """

    def __init__(self, base: Path, adapter: Path | None, nf4: bool = False, tied: bool = False, dtype: torch.dtype | None = None) -> None:
        self.nf4, self.dtype = nf4, dtype
        self.lora = read_adapter(adapter) if adapter else {}
        self.tensors = {name: tensor for name, tensor in read_tensors(base).items() if not (tied and name == HEAD)}
        for name, lora in self.lora.items():
            stored, wanted = self.tensors.get(name), (lora.b.shape[0], lora.a.shape[1])
            if stored is None or stored.shape != wanted:
                why = f"it has no {name}" if stored is None else f"{name} is {stored.shape}, not {wanted}"
                raise InputError(f"the adapter in {adapter} does not fit {base}: {why}; give the model it was trained on")

    def __getitem__(self, name: str) -> Tensor:
        # Open the file for each tensor: an open one keeps every page it has read in this process's memory.
        with safe_open(self.tensors[name].file, "pt") as file:
            weight = file.get_tensor(name)
        weight = weight.to(self.dtype or weight.dtype)
        if self.nf4 and name.endswith("_proj.weight"):
            weight = round_trip_nf4(weight)
        weight = weight.float()
        return weight + self.lora[name].delta() if name in self.lora else weight.clone()


def round_trip_nf4(weight: Tensor) -> Tensor:
    """The weight as 4-bit training sees it: NF4, double quantisation, blocks of 64 (models/load.py)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)


def save_weights(merged: Merged, folder: Path, dtype: torch.dtype, advance: Callable[[int], None]) -> None:
    """Write model.safetensors, or parts of about SHARD bytes with an index. Calls `advance` with the number of tensors of each part.

    Raises InputError for a weight that overflows.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in merged.tensors.items()}
    parts = split_torch_state_dict_into_shards(empty, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD)
    for file, names in parts.filename_to_tensors.items():
        tensors = {name: merged[name].to(dtype) for name in names}
        if odd := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise InputError(f"{odd[0]} does not fit into {dtype}: use --dtype bfloat16, or the run has diverged")
        save_file(tensors, folder / file, metadata={"format": "pt"})
        advance(len(names))
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
