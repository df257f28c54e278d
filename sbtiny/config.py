"""Settings of every stage: frozen and checked. Flags win over the file, the file over the preset, the preset over these defaults.

A file has one section a stage (`data`, `sft`, `grpo`, `eval`) beside `model`, `seed` and `four_bit`; the same keys work as
`--set grpo.lr=3e-4`. A key that does not exist is an error that names the nearest one.
"""

import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sbtiny.errors import InputError

PRESETS = ("cpu", "t4", "rtx4090")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Cold-start data: the model's own correct answers."""

    task: str = "arithmetic"
    limit: int = 1600  # questions
    samples: int = 1  # answers sampled for each question
    temperature: float = 0.7
    max_tokens: int = 900
    verifier: str = "auto"
    slots: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """Cold start. The paper gives neither epochs, learning rate nor batch: chosen by experiment on the bundled model."""

    data: str | None = None
    epochs: float = 2.0
    steps: int = 0  # more than 0 overrides epochs
    lr: float = 2e-3
    batch: int = 8  # rows an update
    micro_batch: int = 8  # rows a forward pass
    max_length: int = 1024  # tokens; a longer row is an error
    warmup: float = 0.05  # share of the updates
    lora_rank: int = 16
    lora_alpha: int = 32
    save_steps: int = 0
    packing: Literal["length", "none"] = "length"  # rows of like length side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Budget-guided GRPO. Rewards and alpha are the paper's; what it leaves open is marked in dev/LOG.md."""

    data: str | None = None  # JSONL questions; the run's own task unless told
    task: str = "arithmetic"
    verifier: str = "auto"
    limit: int = 4000  # training questions to draw from
    steps: int = 110
    prompts: int = 8  # questions a step
    group: int = 8  # answers a question
    micro_batch: int = 16  # answers a forward pass
    lr: float = 1e-3
    warmup: float = 0.03
    beta: float = 0.0  # KL weight; 0 needs no reference model
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    temperature: float = 1.0
    max_tokens: int = 640
    alpha_start: float = 6.0
    alpha_end: float = 0.1
    alpha_hold: float = 0.4  # share of the steps, at the end, that alpha rests at alpha_end; 0 is the paper's
    hindsight: int = 1  # answers of a group retold with the budget they really needed; 0 is the paper's
    user_share: float = 0.0  # share of groups whose budget is prefilled, as a user would
    tight_bmax: bool = False  # b_max follows the shortest correct answer seen; the paper keeps the first
    save_steps: int = 50
    sample_steps: int = 10
    slots: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """Held-out evaluation."""

    task: str = "arithmetic"
    split: Literal["test", "val", "train"] = "test"
    limit: int = 500
    budget: str = "auto"  # auto | N | 0.5x
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 900
    verifier: str = "auto"
    slots: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a run was made with; saved as config.yaml in its folder."""

    model: str = "tiny"
    seed: int = 0
    four_bit: bool | None = None  # None: 4-bit where there is a GPU
    data: DataSettings = field(default_factory=DataSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

    def __post_init__(self) -> None:
        g, s = self.grpo, self.sft
        need(g.group >= 2, "grpo.group", g.group, "a group of 2 or more (the paper's is 5)")
        need(0 <= g.hindsight < g.group, "grpo.hindsight", g.hindsight, "fewer than grpo.group")
        need(g.alpha_start >= g.alpha_end > 0, "grpo.alpha_end", g.alpha_end, "above 0 and at most grpo.alpha_start")
        need(0 <= g.user_share <= 1, "grpo.user_share", g.user_share, "a share from 0 to 1")
        need(0 <= g.alpha_hold < 1, "grpo.alpha_hold", g.alpha_hold, "a share from 0 to below 1")
        need(g.temperature > 0, "grpo.temperature", g.temperature, "above 0: equal answers teach nothing")
        need(
            g.prompts * g.group % min(g.micro_batch, g.prompts * g.group) == 0,
            "grpo.micro_batch",
            g.micro_batch,
            f"a divisor of prompts x group = {g.prompts * g.group}",
        )
        need(s.batch % s.micro_batch == 0, "sft.micro_batch", s.micro_batch, f"a divisor of sft.batch = {s.batch}")
        for name, value in (
            ("grpo.steps", g.steps),
            ("grpo.prompts", g.prompts),
            ("sft.batch", s.batch),
            ("sft.lora_rank", s.lora_rank),
        ):
            need(value >= 1, name, value, "1 or more")

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


def need(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}: set it to {wanted}")


def load(file: Path | None = None, preset: str | None = None, overrides: Iterable[tuple[str, Any]] = ()) -> Settings:
    """Settings from preset, file and flags, in rising order. `overrides` are (dotted key, value); None values are skipped.

    Raises InputError for a missing file, broken YAML, unknown keys and wrong types.
    """
    merged: dict[str, Any] = {}
    for source, text in texts(file, preset):
        for key, value in flatten(parse_yaml(text, source)):
            merged[key] = (value, source)
    merged.update({key: (value, "command line") for key, value in overrides if value is not None})
    return build(Settings, "", merged)


def texts(file: Path | None, preset: str | None) -> Iterable[tuple[str, str]]:
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}: choose from {', '.join(PRESETS)}")
        yield f"preset {preset}", files("sbtiny").joinpath(f"presets/{preset}.yaml").read_text()
    if file is not None:
        if not file.is_file():
            raise InputError(f"no settings file {file}: check the path given to -c")
        yield str(file), file.read_text()


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{source} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError(f"{source} must hold key: value lines, not a {type(found).__name__}")
    return found


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_assignment(text: str) -> tuple[str, Any]:
    """`grpo.lr=3e-4` from the command line."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"--set {text}: write it as section.key=value, for example --set grpo.lr=3e-4")
    return key, yaml.safe_load(value)


def build(kind: type, prefix: str, values: dict[str, tuple[Any, str]]) -> Any:
    """An instance of the settings class `kind` from dotted keys that start with `prefix`."""
    hints, arguments = get_type_hints(kind), {}
    names = {f.name for f in fields(kind)}
    for key, (_, source) in values.items():
        head = key.removeprefix(prefix).split(".")[0]
        section = head in names and is_dataclass(hints[head])
        if head not in names or section != ("." in key.removeprefix(prefix)):
            raise InputError(f"unknown key {key!r} in {source}{nearest(head, names, prefix)}")
    for name in names:
        if is_dataclass(hints[name]):
            inner = f"{prefix}{name}."
            arguments[name] = build(hints[name], inner, {k: v for k, v in values.items() if k.startswith(inner)})
        elif prefix + name in values:
            arguments[name] = coerce(prefix + name, *values[prefix + name], hints[name])
    return kind(**arguments)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    found = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix + found[0]!r}?" if found else ""


def coerce(key: str, value: Any, source: str, wanted: Any) -> Any:
    """The value as the annotated type; YAML's `3e-4` is text and becomes a number where one is wanted."""
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
            except (TypeError, ValueError):
                continue
            if option is float or number == int(number):
                return option(number)
        elif option in (str, bool) and isinstance(value, option):
            return value
        elif option is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    shown = " or ".join("nothing" if option is type(None) else option.__name__ for option in options)
    raise InputError(f"{key} in {source} is {value!r}: it must be {shown}")
