"""Names and shapes of tensors that are not a model's: the first wrong one, the likely cause, and the mend. Imports no torch."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from sbtiny.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WHOLE = "check that the model is whole"
# What a library puts into the names of what it wraps.
WRAPPERS = {
    "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP", "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "peft", ".base_layer": "peft", "module.": "DataParallel",
}  # fmt: skip
LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

Shape = tuple[int, ...]


def refusal(where: Path | str, what: str, mend: str) -> InputError:
    return InputError(f"cannot load {where}: {what}; {mend}")


def check(
    where: Path | str,
    wanted: Sequence[str],
    missing: Sequence[str],
    unexpected: Sequence[str],
    changed: Sequence[tuple[str, Shape, Shape]],
) -> None:
    """Raises InputError for the first tensor that is wrong. `changed` has shapes: in the file, and by config.json."""
    if missing and unexpected and (found := renamed(set(missing), unexpected)):
        raise refusal(where, *found)
    if missing:
        raise refusal(where, *absent(wanted, missing))
    if unexpected:
        raise refusal(where, *spare(wanted, unexpected))
    if changed:
        raise refusal(where, *resized(*changed[0]))


def renamed(missing: Collection[str], unexpected: Iterable[str]) -> tuple[str, str] | None:
    """The first tensor that is there under another name."""
    for name in unexpected:
        bare = name
        for part in WRAPPERS:
            bare = bare.replace(part, "")
        if bare in missing:
            part = next(part for part in WRAPPERS if part in name)
            says = f"{name} is {bare} with {part!r} of {WRAPPERS[part]} in its name"
            return says, "unwrap the model and save it with save_pretrained again"
        for other in missing:
            if name.endswith(f".{other}"):
                return f"{name} is {other} with {name.removesuffix(other)!r} in front", "save it with names that have nothing in front"
            if other.endswith(f".{name}"):
                return f"{name} is {other} without {other.removesuffix(name)!r}", "save it as AutoModelForCausalLM with save_pretrained"
    return None


def absent(wanted: Sequence[str], missing: Sequence[str]) -> tuple[str, str]:
    if list(missing) == [HEAD]:
        says = f"{HEAD} is missing, and config.json does not tie it to the embedding (tie_word_embeddings)"
        return says, "set that to true if the model was tied, else take the file that has it"
    there, all_layers = layers(set(wanted) - set(missing)), layers(wanted)
    if layers(missing) and not layers(missing) & there:
        says = f"{named(missing)} missing: the files have {len(there)} layers, config.json says {len(all_layers)} (num_hidden_layers)"
        return says, "download the model again, or correct config.json"
    return f"{named(missing)} missing", "download the model again, or take the config.json that belongs to it"


def spare(wanted: Sequence[str], unexpected: Sequence[str]) -> tuple[str, str]:
    if ".lora_" in unexpected[0]:
        return f"{named(unexpected)} part of an adapter", "merge it into the model first (merge_and_unload)"
    if layers(unexpected) - layers(wanted):
        count, says = len(layers(wanted) | layers(unexpected)), len(layers(wanted))
        line = f"{named(unexpected)} not the model's: the files have {count} layers, config.json says {says} (num_hidden_layers)"
        return line, "correct config.json, or take the one that belongs to the model"
    mend = "take the config.json that belongs to it (model_type, attention_bias), or save it without"
    return f"{named(unexpected)} no part of the model that config.json describes", mend


def resized(name: str, found: Shape, wanted: Shape) -> tuple[str, str]:
    says = f"{name} is {show(found)} in the file and {show(wanted)} by config.json"
    if name in (EMBEDDING, HEAD) and found[1:] == wanted[1:]:
        return says, f"the vocabulary was resized: set vocab_size to {found[0]}, or take the weights that belong to config.json"
    return says, "take the config.json that belongs to the weights"


def untied(where: Path | str, name: str, source: str) -> InputError:
    what = f"{name} has other values than {source}, to which config.json ties it (tie_word_embeddings)"
    return refusal(where, what, "set that to false, or take the tensor out of the file")


def layers(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := LAYER.search(name))}


def named(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def show(shape: Shape) -> str:
    return " x ".join(map(str, shape))
