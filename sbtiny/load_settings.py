"""Settings from a preset, a file and flags, with keys and types checked. Flags win over the file, the file over the preset.

A file has one section a stage (`data`, `sft`, `grpo`, `eval`, `serve`), and `prompt`, beside `model`, `seed` and others. The same keys
work as `--set grpo.learning_rate=3e-4`. A key that does not exist is an error that names the nearest one.
"""

import math
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sbtiny.config import Settings
from sbtiny.errors import InputError

Assignment = tuple[str, Any, str]  # dotted key, value, source (for messages)
PRESETS = ("cpu", "t4", "rtx4090")
RENAMED = {  # keys of versions before 0.1; the error names the new key
    "kv_memory": "kv_cache_gib",
    "data.samples": "data.samples_per_question",
    "data.keep": "data.rows_per_question",
    "sft.data": "sft.rows",
    "grpo.data": "grpo.questions",
    "grpo.prompts": "grpo.prompts_per_step",
    "grpo.group": "grpo.num_generations",
    "grpo.decay": "grpo.lr_scheduler_type",
    "grpo.clip": "grpo.max_grad_norm",
    "grpo.loss": "grpo.loss_type",
    "grpo.hindsight": "grpo.relabel_per_group",
    "grpo.user_hindsight": "grpo.relabel_per_user_group",
    "grpo.slope": "grpo.outside_slope",
    "grpo.centre": "grpo.reward_peak",
    "grpo.tight_bmax": "grpo.b_max_from_best",
    "grpo.failed_bmax": "grpo.b_max_if_failed",
    "grpo.replace_flat": "grpo.resample_zero_std",
    "grpo.patience": "grpo.alarm_patience",
    "eval.cut": "eval.cut_at",
    **{f"{section}.slots": f"{section}.max_num_seqs" for section in ("data", "grpo", "eval")},
    **{f"{section}.lr": f"{section}.learning_rate" for section in ("sft", "grpo")},
}
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def load_settings(file: Path | None = None, preset: str | None = None, overrides: Iterable[tuple[str, Any]] = ()) -> Settings:
    """Settings from preset, file and `overrides`, (dotted key, value) pairs; the last assignment of a key wins.

    Raises InputError for a missing file, broken YAML, unknown keys, wrong types and values out of range.
    """
    types, merged = key_types(), {}
    for key, value, source in iter_assignments(file, preset, overrides):
        if value is None and is_dataclass(types.get(key)):
            continue  # an empty section
        check_key(key, value, source)
        merged[key] = (value, source)
    arguments: dict[str, dict[str, Any]] = {"": {}} | {name: {} for name, kind in types.items() if is_dataclass(kind)}
    for key, given in merged.items():
        section, _, name = key.rpartition(".")
        arguments[section][name] = coerce_value(key, *given, types[key])
    plain = arguments.pop("")
    return Settings(**plain, **{name: types[name](**values) for name, values in arguments.items()})


def iter_assignments(file: Path | None, preset: str | None, overrides: Iterable[tuple[str, Any]]) -> Iterator[Assignment]:
    for source, text in settings_texts(file, preset):
        for key, value in flatten_keys(parse_yaml(text, source)):
            yield key, value, source
    for key, value in overrides:
        yield key, value, "the command line"


def settings_texts(file: Path | None, preset: str | None) -> Iterator[tuple[str, str]]:
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}{suggest_key(preset, PRESETS)}: choose from {', '.join(PRESETS)}")
        yield f"preset {preset}", files("sbtiny").joinpath(f"presets/{preset}.yaml").read_text(encoding="utf-8")
    if file is not None:
        if not file.is_file():
            raise InputError(f"no settings file {file}: check the path given to -c")
        yield str(file), read_utf8(file)


def read_utf8(file: Path) -> str:
    """The text of a file that the user wrote. Raises InputError where it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}; save it as UTF-8 text") from error


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    tree = read_yaml(text, source) or {}
    if not isinstance(tree, dict):
        raise InputError(f"{source} must hold key: value lines, not a {type(tree).__name__}")
    return tree


def read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(problem or error).split())
        raise InputError(f"{source}{where}: no valid YAML ({reason}): write key: value lines") from error


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once, as its standard says; PyYAML takes the last one and drops what stood before."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((key for key, _ in reversed(node.value) if keys.count(key.value) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{twice.value} stands twice", problem_mark=twice.start_mark)
        return super().construct_mapping(node, deep)


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_assignment(text: str) -> tuple[str, Any]:
    """Key and value of `grpo.learning_rate=3e-4`. What a key of text is set to stands as it is, but for quotes and null.

    Raises InputError.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"--set {text}: write it as section.key=value, for example --set grpo.learning_rate=3e-4")
    plain = value.strip()
    if key_types().get(key) in (str, str | None) and plain[:1] not in ("", "'", '"', "~") and plain != "null":
        return key, plain  # YAML would read "answer: #3" as a mapping with a comment
    return key, read_yaml(value, f"--set {text}")


@cache
def key_types() -> dict[str, Any]:
    """The type of every dotted key of Settings; that of a section is its class."""
    types = get_type_hints(Settings)
    return types | {f"{name}.{key}": of for name, kind in types.items() if is_dataclass(kind) for key, of in get_type_hints(kind).items()}


def check_key(key: str, value: Any, source: str) -> None:
    keys = [name for name, kind in key_types().items() if not is_dataclass(kind)]
    if key in key_types() and key not in keys:
        first = next(name for name in keys if name.startswith(f"{key}."))
        raise InputError(f"{key} in {source} is {value!r}: it is a section, set its keys, such as {first}")
    if key in RENAMED:
        raise InputError(f"unknown key {key!r} in {source}: it is called {RENAMED[key]!r} now")
    if key not in keys:
        suggestion = suggest_key(key, keys)
        hint = "" if suggestion else ": sbtiny sft --dry-run and sbtiny grpo --dry-run show the keys there are"
        raise InputError(f"unknown key {key!r} in {source}{suggestion}{hint}")


def suggest_key(name: str, known: Sequence[str]) -> str:
    """ " (did you mean ...?)": the same key of another section, else a similar key of this section; "" if there is none."""
    section, _, last = name.rpartition(".")
    same = [key for key in known if key.rpartition(".")[2] == last]
    own = [key for key in known if key.rpartition(".")[0] == section] or known
    by_last = {key.rpartition(".")[2]: key for key in own}
    suggestions = same or [by_last[key] for key in get_close_matches(last, by_last, n=1)]
    return f" (did you mean {' or '.join(map(repr, suggestions))}?)" if suggestions else ""


def expand_home(text: str) -> str:
    """Expand a leading ~ or ~name as the shell does; other text, and an unknown name, stay as they are."""
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        return text


def coerce_value(key: str, value: Any, source: str, wanted: Any) -> Any:
    """The value as the type `wanted`; YAML reads `3e-4` as text, so text may become a number. Raises InputError."""
    options = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise InputError(f"{key} in {source} is {value!r}: choose from {', '.join(get_args(wanted))}")
    for option in options:
        if option is type(None) and value is None:
            return None
        if option in (int, float) and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if math.isfinite(number) and (option is float or number == int(number)):
                return option(number)
        elif option in (str, bool) and isinstance(value, option):
            return expand_home(value) if option is str else value
        elif option is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    wanted = " or ".join(TYPES[option] for option in options)
    raise InputError(f"{key} in {source} is {value!r}: it must be {wanted}")
