"""What an export reads of the base beside its weights, and whether it is the base that was trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from sbtiny import runs
from sbtiny.budget.protocol import Format
from sbtiny.budget.template import fitted, with_budget
from sbtiny.errors import InputError
from sbtiny.export import template
from sbtiny.export.merge import Merged
from sbtiny.models.load import fingerprint, load_tokenizer
from sbtiny.models.prompts import turn_end

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

EMBEDDING = "model.embed_tokens.weight"


def read_config(base: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base)
    except Exception as error:  # its fields are anything's: transformers raises KeyError, TypeError and errors of its own as well
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {base / 'config.json'}: {reason}; give the model the run was trained on") from error


def check_same(merged: Merged, run: Path) -> None:
    """Raises InputError when the base has other weights than the one trained on; runs of before that was noted pass."""
    if EMBEDDING not in merged.files:
        raise InputError(f"{merged.base} has no {EMBEDDING}: only models laid out as Llama's can be exported")
    about = runs.read_run(run)
    if known := about.get("base"):
        with safe_open(merged.files[EMBEDDING], "pt") as file:
            rows = file.get_slice(EMBEDDING)[:256].to(getattr(torch, about["dtype"]))
        if fingerprint(rows) != known:
            raise InputError(f"{merged.base} has other weights than the base {run} was trained on: give the model it was trained on")


def read_tokenizer(base: Path, form: Format) -> "PreTrainedTokenizerBase":
    """The base's, with the chat template of training and a place in it for a budget."""
    trained, found = load_tokenizer(str(base)), load_tokenizer(str(base))
    trained.chat_template = fitted(trained.chat_template, form)
    found.chat_template = with_budget(trained.chat_template or "", form)
    template.check_prompts(trained, found, form)
    return found


def read_generation(base: Path) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(base) if (base / "generation_config.json").is_file() else GenerationConfig()


def ordered_stops(found: frozenset[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end of a turn first: it is what ends an answer."""
    first = turn_end(tokenizer)
    first = first if first is not None else tokenizer.eos_token_id
    return [first, *sorted(found - {first})] if first is not None else sorted(found)
