"""Errors for tensors with wrong names or shapes: the first one, the likely cause, and the remedy. Imports no torch."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from sbtiny.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WHOLE = "check that the model is whole"
# Part of a name -> the library that adds it to wrapped modules.
WRAPPERS = {
    "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP", "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "peft", ".base_layer": "peft", "module.": "DataParallel",
}  # fmt: skip
LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

Shape = tuple[int, ...]


def load_error(where: Path | str, what: str, hint: str) -> InputError:
    return InputError(f"cannot load {where}: {what}; {hint}")


def check_names_and_shapes(
    where: Path | str,
    wanted: Sequence[str],
    missing: Sequence[str],
    unexpected: Sequence[str],
    changed: Sequence[tuple[str, Shape, Shape]],
) -> None:
    """Raises InputError for the first wrong tensor. `changed`: name, shape in the file, shape by config.json."""
    if missing and unexpected and (fault := find_renamed(set(missing), unexpected)):
        raise load_error(where, *fault)
    if missing:
        raise load_error(where, *explain_missing(wanted, missing))
    if unexpected:
        raise load_error(where, *explain_unexpected(wanted, unexpected))
    if changed:
        raise load_error(where, *explain_resized(*changed[0]))


def find_renamed(missing: Collection[str], unexpected: Iterable[str]) -> tuple[str, str] | None:
    """Fault and hint of the first tensor that is stored under another name; None if there is none."""
    for name in unexpected:
        bare = name
        for part in WRAPPERS:
            bare = bare.replace(part, "")
        if bare in missing:
            part = next(part for part in WRAPPERS if part in name)
            fault = f"{name} is {bare} with {part!r} of {WRAPPERS[part]} in its name"
            return fault, "unwrap the model and save it with save_pretrained again"
        for other in missing:
            if name.endswith(f".{other}"):
                return f"{name} is {other} with {name.removesuffix(other)!r} in front", "save it without this prefix"
            if other.endswith(f".{name}"):
                return f"{name} is {other} without {other.removesuffix(name)!r}", "save it as AutoModelForCausalLM with save_pretrained"
    return None


def explain_missing(wanted: Sequence[str], missing: Sequence[str]) -> tuple[str, str]:
    if list(missing) == [HEAD]:
        fault = f"{HEAD} is missing, and config.json does not tie it to the embedding (tie_word_embeddings)"
        return fault, "set that to true if the model was tied, else take the file that has it"
    in_files, in_config = layers(set(wanted) - set(missing)), layers(wanted)
    if layers(missing) and not layers(missing) & in_files:
        fault = (
            f"{list_names(missing)} missing: the files have {len(in_files)} layers, config.json says {len(in_config)} (num_hidden_layers)"
        )
        return fault, "download the model again, or correct config.json"
    return f"{list_names(missing)} missing", "download the model again, or take the config.json that belongs to it"


def explain_unexpected(wanted: Sequence[str], unexpected: Sequence[str]) -> tuple[str, str]:
    if ".lora_" in unexpected[0]:
        return f"{list_names(unexpected)} part of an adapter", "merge it into the model first (merge_and_unload)"
    if layers(unexpected) - layers(wanted):
        in_files, in_config = len(layers(wanted) | layers(unexpected)), len(layers(wanted))
        fault = (
            f"{list_names(unexpected)} not the model's: the files have {in_files} layers, config.json says {in_config} (num_hidden_layers)"
        )
        return fault, "correct config.json, or take the one that belongs to the model"
    hint = "take the config.json that belongs to it (model_type, attention_bias), or save it without"
    return f"{list_names(unexpected)} no part of the model that config.json describes", hint


def explain_resized(name: str, stored: Shape, wanted: Shape) -> tuple[str, str]:
    fault = f"{name} is {show(stored)} in the file and {show(wanted)} by config.json"
    if name in (EMBEDDING, HEAD) and stored[1:] == wanted[1:]:
        return fault, f"the vocabulary was resized: set vocab_size to {stored[0]}, or take the weights that belong to config.json"
    return fault, "take the config.json that belongs to the weights"


def untied_error(where: Path | str, name: str, source: str) -> InputError:
    what = f"{name} has other values than {source}, to which config.json ties it (tie_word_embeddings)"
    return load_error(where, what, "set that to false, or take the tensor out of the file")


def layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := LAYER.search(name))}


def list_names(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def show(shape: Shape) -> str:
    return " x ".join(map(str, shape))
