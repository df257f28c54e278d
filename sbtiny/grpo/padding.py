"""Micro-batches of answers of like length, with padding columns cut off."""

from typing import Any

import torch
from torch import Tensor


def sort_by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows sorted by completion length; each micro-batch keeps its row count."""
    sizes = [len(batch["completion_mask"]) for batch in batches]
    rows = {
        name: torch.cat([batch[name] for batch in batches])
        for name, value in batches[0].items()
        if isinstance(value, Tensor) and value.ndim > 0
    }
    order = rows["completion_mask"].sum(1).argsort(stable=True)
    parts = {name: value[order].split(sizes) for name, value in rows.items()}
    return [batch | {name: parts[name][i] for name in rows} for i, batch in enumerate(batches)]


def trim_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """Cut columns that are padding in every row: prompts are padded on the left, completions on the right.

    Cuts nothing where log-probabilities of the old policy or the reference have another width than the completions: unsloth's trainer moves
    all padding to the right first, and finds the offset of each row from that width.
    """
    logps = [value for name, value in inputs.items() if name.endswith("per_token_logps") and isinstance(value, Tensor)]
    if any(value.shape[1] != inputs["completion_mask"].shape[1] for value in logps):
        return inputs
    prompt, completion = inputs["prompt_mask"].sum(1).max(), inputs["completion_mask"].sum(1).max()
    width = inputs["prompt_mask"].shape[1] - prompt

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] == 1:
            return value
        return value[:, width:] if name.startswith("prompt") else value[:, :completion]

    return {name: cut(name, value) for name, value in inputs.items()}
