"""Settings of every stage: frozen and checked. Flags win over the file, the file over the preset, the preset over these defaults.

A file has one section a stage (`data`, `sft`, `grpo`, `eval`) beside `model`, `seed` and `four_bit`; the same keys work as
`--set grpo.lr=3e-4`. A key that does not exist is an error that names the nearest one.
"""

import math
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sbtiny.budget.protocol import FormatName, parse_budget_option
from sbtiny.budget.reward import Schedule
from sbtiny.errors import InputError

WRAP_UP = "\n\nTime is up. \\boxed{"
PRESETS = ("cpu", "t4", "rtx4090")
BackendName = Literal["auto", "unsloth", "transformers"]
EngineName = Literal["ours", "generate", "vllm"]
Reporter = Literal["none", "tensorboard", "trackio", "wandb"]
Assignment = tuple[str, Any, str]  # dotted key, value, where it was said
AT_LEAST_1 = (
    *("grpo.reserve", "eval.reserve"),
    *("data.limit", "data.samples", "data.max_tokens", "data.slots"),
    *("sft.batch", "sft.micro_batch", "sft.max_length", "sft.lora_rank", "sft.lora_alpha"),
    *("grpo.limit", "grpo.steps", "grpo.prompts", "grpo.micro_batch", "grpo.max_tokens", "grpo.sample_steps"),
    *("grpo.patience", "grpo.slots", "eval.limit", "eval.max_tokens", "eval.slots"),
)
AT_LEAST_0 = (
    *("data.keep", "eval.cut", "eval.ceiling", "eval.temperature", "data.temperature"),
    *("sft.steps", "sft.contrast", "sft.save_steps", "grpo.save_steps", "grpo.beta"),
)
ABOVE_0 = ("sft.epochs", "sft.lr", "grpo.lr", "grpo.clip")
SHARES = ("sft.warmup", "grpo.warmup", "grpo.user_share", "grpo.cut_share", "grpo.centre")
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Cold-start data: the model's own correct answers."""

    task: str = "arithmetic"
    limit: int = 1200  # questions
    samples: int = 4  # answers sampled for each question
    keep: int = 2  # rows of a question: of its correct answers the shortest, the longest, and evenly between; 0 keeps all
    temperature: float = 0.7
    max_tokens: int = 900
    verifier: str = "auto"
    slots: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """Cold start. The paper gives neither epochs, learning rate nor batch: chosen by experiment on the bundled model."""

    data: str | None = None
    epochs: float = 6.0  # the length comes to follow the number suddenly, and later on some seeds than on others
    steps: int = 0  # more than 0 overrides epochs
    lr: float = 2e-3
    batch: int = 4  # rows an update
    micro_batch: int = 4  # most rows a forward pass; the largest divisor of an update's rows up to it is taken
    max_length: int = 1024  # tokens; a longer row is an error
    warmup: float = 0.05  # share of the updates
    contrast: float = 0.0  # weight of holding an answer's number against that of another answer to its question; 0 is the paper's
    lora_rank: int = 32
    lora_alpha: int = 64
    save_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Budget-guided GRPO. Rewards and alpha are the paper's; what it leaves open is marked in dev/LOG.md."""

    data: str | None = None  # JSONL questions; the run's own task unless told
    task: str = "arithmetic"
    verifier: str = "auto"
    limit: int = 4000  # training questions to draw from
    steps: int = 120
    prompts: int = 8  # questions a step
    group: int = 8  # answers a question
    micro_batch: int = 16  # most answers a forward pass; the largest divisor of a step's answers up to it is taken
    lr: float = 7e-4
    decay: Literal["cosine", "constant_with_warmup"] = "cosine"  # of the learning rate
    clip: float = 0.1  # largest norm of an update's gradient
    warmup: float = 0.03
    beta: float = 0.0  # KL weight; 0 needs no reference model
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    temperature: float = 0.8  # at 1 a number's flat tail is sampled too, and half of the steps go into cutting it off
    max_tokens: int = 640
    alpha_start: float = 6.0
    alpha_end: float = 0.1
    alpha_schedule: Schedule = "linear"  # how alpha falls; fixed: alpha_end throughout
    alpha_hold: float = 0.6  # share of the steps, at the end, that alpha rests at alpha_end; 0 is the paper's
    hindsight: int = 1  # answers of a self-set group retold with the budget they really needed; 0 is the paper's
    user_hindsight: int = 2  # the same in groups with a user's budget
    slope: float = 0.1  # most that a length outside the window loses below s_min; 0 is the paper's
    centre: float = 1.0  # where the reward peaks: 1 at l = b, 0 on the window's edge (the paper's)
    user_share: float = 0.5  # share of groups whose budget is prefilled, as a user would; 0 is the paper's
    cut_share: float = 0.0  # share of groups that are cut below their own number and learn to finish
    wrap_up: str = WRAP_UP  # put into a body that has reached its ceiling
    reserve: int = 32  # tokens for the wrap-up and the answer after it
    user_low: float = 0.3  # a prefilled budget is drawn between these multiples of the model's own
    user_high: float = 4.0
    tight_bmax: bool = False  # b_max is at most 1 + alpha times the shortest correct answer seen
    failed_bmax: float | None = None  # b_max of questions the initial model failed; null is the paper's: no bound
    replace_flat: bool = False  # a group of equal rewards is sampled again, once, with another question
    patience: int = 20  # steps running that an alarm's condition must hold before it rings
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
    temperature: float = 0.6  # the paper's, as in every preset
    top_p: float = 0.95  # with it, what the R1 models are recommended to be sampled with; 1 is off
    cut: float = 0.0  # cut the body at this share of its number and wrap it up; 0 is off
    ceiling: int = 0  # cut the body at this many tokens and wrap it up; 0 is off
    wrap_up: str = WRAP_UP  # put into a body that has reached its ceiling
    reserve: int = 32  # tokens for the wrap-up and the answer after it
    max_tokens: int = 900
    verifier: str = "auto"
    slots: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a run was made with; saved as config.yaml in its folder."""

    model: str = "tiny"
    seed: int = 0
    format: FormatName = "solution"  # the tags a cold start teaches: the paper's, or <think>thoughts</think>answer; later stages keep to it
    four_bit: bool | None = None  # None: 4-bit where there is a GPU
    backend: BackendName = "auto"  # what loads and trains: unsloth where it is installed and can run, else transformers and peft
    engine: EngineName = "ours"  # what decodes: ours; generate, slower, for any model of transformers; vllm where it is installed
    kv_memory: float | None = None  # GiB for the keys and values of answers under way; null: most of what is free
    report_to: Reporter = "none"  # where training curves go beside the run's own metrics.jsonl; its package must be installed
    data: DataSettings = field(default_factory=DataSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

    def __post_init__(self) -> None:
        for keys, holds, wanted in (
            (AT_LEAST_1, lambda value: value >= 1, "1 or more"),
            (AT_LEAST_0, lambda value: value >= 0, "0 or more"),
            (ABOVE_0, lambda value: value > 0, "a number above 0"),
            (SHARES, lambda value: 0 <= value <= 1, "a share from 0 to 1"),
        ):
            for key in keys:
                value = attrgetter(key)(self)
                need(holds(value), key, value, wanted)
        g = self.grpo
        need(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to below 2**32")
        need(self.kv_memory is None or self.kv_memory > 0, "kv_memory", self.kv_memory, "a number of GiB above 0, or null")
        limits = self.engine == "vllm" and (g.cut_share > 0 or self.eval.cut > 0 or self.eval.ceiling > 0)
        wanted = "ours or generate, or grpo.cut_share, eval.cut and eval.ceiling to 0: vllm cannot cut answers"
        need(not limits, "engine", self.engine, wanted)
        need(g.group >= 2, "grpo.group", g.group, "a group of 2 or more (the paper's is 5)")
        need(g.user_share + g.cut_share <= 1, "grpo.cut_share", g.cut_share, "at most 1 - grpo.user_share")
        need(0 < g.user_low <= g.user_high, "grpo.user_low", g.user_low, "above 0 and at most grpo.user_high")
        need(0 <= g.user_hindsight < g.group, "grpo.user_hindsight", g.user_hindsight, "0 or more and fewer than grpo.group")
        need(0 <= g.hindsight < g.group, "grpo.hindsight", g.hindsight, "0 or more and fewer than grpo.group")
        need(g.alpha_start >= g.alpha_end > 0, "grpo.alpha_end", g.alpha_end, "above 0 and at most grpo.alpha_start")
        need(g.failed_bmax is None or g.failed_bmax >= 1, "grpo.failed_bmax", g.failed_bmax, "1 token or more, or null for none")
        need(0 <= g.alpha_hold < 1, "grpo.alpha_hold", g.alpha_hold, "a share from 0 to below 1")
        need(g.temperature > 0, "grpo.temperature", g.temperature, "above 0: equal answers teach nothing")
        need(0 < self.eval.top_p <= 1, "eval.top_p", self.eval.top_p, "above 0 and at most 1 (1 is off)")
        parse_budget_option(self.eval.budget)

    def rows(self, stage: str) -> int:
        """Rows an update of a stage; 0 where it trains nothing."""
        return {"sft": self.sft.batch, "grpo": self.grpo.prompts * self.grpo.group}.get(stage, 0)

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


def micro_batch(rows: int, most: int) -> int:
    """Rows a forward pass of an update of `rows`: the largest divisor up to `most`."""
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


def need(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}: set it to {wanted}")


def load(file: Path | None = None, preset: str | None = None, overrides: Iterable[tuple[str, Any]] = ()) -> Settings:
    """Settings from preset, file and flags, in rising order. `overrides` are (dotted key, value), the last one wins.

    Raises InputError for a missing file, broken YAML, unknown keys, wrong types and values out of range.
    """
    merged: dict[str, tuple[Any, str]] = {}
    for key, value, source in assignments(file, preset, overrides):
        if value is None and key in known_keys():
            continue  # a section whose lines are all commented out
        check_key(key, value, source)
        merged[key] = (value, source)
    return build(Settings, "", merged)


def assignments(file: Path | None, preset: str | None, overrides: Iterable[tuple[str, Any]]) -> Iterator[Assignment]:
    for source, text in texts(file, preset):
        for key, value in flatten(parse_yaml(text, source)):
            yield key, value, source
    for key, value in overrides:
        yield key, value, "the command line"


def texts(file: Path | None, preset: str | None) -> Iterator[tuple[str, str]]:
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}: choose from {', '.join(PRESETS)}")
        yield f"preset {preset}", files("sbtiny").joinpath(f"presets/{preset}.yaml").read_text(encoding="utf-8")
    if file is not None:
        if not file.is_file():
            raise InputError(f"no settings file {file}: check the path given to -c")
        try:
            yield str(file), file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {file}: {error}; save it as UTF-8 text") from error


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    found = read_yaml(text, source) or {}
    if not isinstance(found, dict):
        raise InputError(f"{source} must hold key: value lines, not a {type(found).__name__}")
    return found


def read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(problem or error).split())
        raise InputError(f"{source}{where}: no valid YAML ({reason}): write key: value lines") from error


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
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
    return key, read_yaml(value, f"--set {text}")


@cache
def known_keys() -> dict[str | None, tuple[str, ...]]:
    """The dotted keys of Settings by section; those of no section under None."""
    hints = get_type_hints(Settings)
    sections = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    plain = tuple(name for name in hints if name not in sections)
    return {None: plain} | {name: tuple(f"{name}.{f.name}" for f in fields(kind)) for name, kind in sections.items()}


def check_key(key: str, value: Any, source: str) -> None:
    known = known_keys()
    if key in known:
        raise InputError(f"{key} in {source} is {value!r}: it is a section, set its keys, such as {known[key][0]}")
    keys = [each for section in known.values() for each in section]
    if key not in keys:
        near = nearest(key, keys)
        mend = "" if near else ": sbtiny sft --dry-run and sbtiny grpo --dry-run show the keys there are"
        raise InputError(f"unknown key {key!r} in {source}{near}{mend}")


def build(kind: type, prefix: str, values: dict[str, tuple[Any, str]]) -> Any:
    """An instance of the settings class `kind` from the dotted keys that start with `prefix`."""
    hints, arguments = get_type_hints(kind), {}
    for item in fields(kind):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            arguments[item.name] = build(hints[item.name], f"{key}.", values)
        elif key in values:
            arguments[item.name] = coerce(key, *values[key], hints[item.name])
    return kind(**arguments)


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant: the same key of another section, else one of its section spelt like it."""
    section, _, last = name.rpartition(".")
    same = [key for key in known if key.rpartition(".")[2] == last]
    own = [key for key in known if key.rpartition(".")[0] == section] or known
    by_last = {key.rpartition(".")[2]: key for key in own}
    found = same or [by_last[key] for key in get_close_matches(last, by_last, n=1)]
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def expand_home(text: str) -> str:
    """A path that begins with ~ or ~name as the shell gives it; any other text, and a name that nobody has, as it is."""
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        return text


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
