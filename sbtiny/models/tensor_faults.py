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

TensorShape = tuple[int, ...]
Fault = tuple[str, str]  # what is wrong, and what to do


def load_error(where: Path | str, what: str, hint: str = WHOLE) -> InputError:
    return InputError(f"cannot load {where}: {what}; {hint}")


def check_names_and_shapes(
    where: Path | str,
    wanted: Sequence[str],
    missing: Sequence[str],
    unexpected: Sequence[str],
    changed: Sequence[tuple[str, TensorShape, TensorShape]],
) -> None:
    """Raises InputError for the first wrong tensor. `changed`: name, shape in the file, shape by config.json."""
    fault = explain_renamed(set(missing), unexpected) or explain_missing(wanted, missing) or explain_unexpected(wanted, unexpected)
    if fault or changed:
        raise load_error(where, *(fault or explain_resized(*changed[0])))


def explain_renamed(missing: Collection[str], unexpected: Iterable[str]) -> Fault | None:
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


def explain_missing(wanted: Sequence[str], missing: Sequence[str]) -> Fault | None:
    if not missing:
        return None
    if list(missing) == [HEAD]:
        fault = f"{HEAD} is missing, and config.json does not tie it to the embedding (tie_word_embeddings)"
        return fault, "set that to true if the model was tied, else take the file that has it"
    in_files = layers(set(wanted) - set(missing))
    if layers(missing) and not layers(missing) & in_files:
        return f"{list_names(missing)} missing: {count_layers(in_files, wanted)}", "download the model again, or correct config.json"
    return f"{list_names(missing)} missing", "download the model again, or take the config.json that belongs to it"


def explain_unexpected(wanted: Sequence[str], unexpected: Sequence[str]) -> Fault | None:
    if not unexpected:
        return None
    if ".lora_" in unexpected[0]:
        return f"{list_names(unexpected)} part of an adapter", "merge it into the model first (merge_and_unload)"
    if layers(unexpected) - layers(wanted):
        counts = count_layers(layers([*wanted, *unexpected]), wanted)
        return f"{list_names(unexpected)} not the model's: {counts}", "correct config.json, or take the one that belongs to the model"
    hint = "take the config.json that belongs to it (model_type, attention_bias), or save it without"
    return f"{list_names(unexpected)} no part of the model that config.json describes", hint


def explain_resized(name: str, stored: TensorShape, wanted: TensorShape) -> Fault:
    fault = f"{name} is {' x '.join(map(str, stored))} in the file and {' x '.join(map(str, wanted))} by config.json"
    if name in (EMBEDDING, HEAD) and stored[1:] == wanted[1:]:
        return fault, f"the vocabulary was resized: set vocab_size to {stored[0]}, or take the weights that belong to config.json"
    return fault, "take the config.json that belongs to the weights"


def untied_error(where: Path | str, name: str, source: str) -> InputError:
    what = f"{name} has other values than {source}, to which config.json ties it (tie_word_embeddings)"
    return load_error(where, what, "set that to false, or take the tensor out of the file")


def layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := LAYER.search(name))}


def count_layers(in_files: set[int], wanted: Sequence[str]) -> str:
    return f"the files have {len(in_files)} layers, config.json says {len(layers(wanted))} (num_hidden_layers)"


def list_names(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
