"""Shared options of the verbs, their settings, and helpers. Imports nothing heavy at the top."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from sbtiny.cli import streams
from sbtiny.config import UPSTREAM_KEY, Settings
from sbtiny.errors import InputError

TRAIN, USE, HELP = "Train", "Use and measure", "Look"  # panels of the help

AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
FourBit = Annotated[
    bool | None,
    typer.Option("--4bit/--no-4bit", help="NF4 base weights (default: as the run has it, else on a GPU)."),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id, folder or .gguf file (sbtiny models lists aliases).")]
Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Where the model of a run is (default: as run.json says): hub id, folder or .gguf file.")
]
KvMemory = Annotated[
    float | None,
    typer.Option(metavar="GIB", help="GiB for the KV cache (default: most of the free memory); answers that do not fit wait."),
]
VERIFIER = "auto, numeric, math, choice, exact, regex, or a function of your own: my.py:check."
FORMAT = "Tags to teach: solution (the paper's), or think, with the answer after it."
BACKEND = "What loads and trains: auto (unsloth on a GPU), unsloth, or transformers."
ENGINE = "What decodes: ours, generate (any model of transformers; slower, and cannot stream), or vllm."
Upstreams = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="A llama-server, vLLM or ollama that decodes elsewhere; several may be given."),
]
UpstreamKey = Annotated[str | None, typer.Option(envvar=UPSTREAM_KEY, help="Key that the upstreams want.")]
REPORT_TO = "Training curves also go to tensorboard, trackio or wandb (default: none)."

# Shared options in the order of the help. Each has a type with its help text, and the settings key that it sets ("": no setting).
# `{section}` is the verb's section of the settings, `{questions}` the section that reads its questions.
OPTIONS: dict[str, tuple[Any, str]] = {
    "config": (Annotated[Path | None, typer.Option("-c", "--config", help="Settings file (YAML).")], ""),
    "preset": (Annotated[str | None, typer.Option(help="cpu, t4, rtx4090, or auto: by what is here.")], ""),
    "model": (Model, "model"),
    "base": (Base, "base"),
    "output": (
        Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write (default: new, under runs/, or the run's).")],
        "",
    ),
    "format": (Annotated[str | None, typer.Option("--format", help=FORMAT)], "format"),
    "verifier": (Annotated[str | None, typer.Option(help=VERIFIER)], "{questions}.verifier"),
    "seed": (Annotated[int | None, typer.Option(help="Seed of everything random.")], "seed"),
    "limit": (Annotated[int | None, typer.Option(help="Number of questions to read.")], "{questions}.limit"),
    "max_tokens": (
        Annotated[str | None, typer.Option("--max-tokens", help="Most tokens of an answer; auto: by a probe of the model's own lengths.")],
        "{questions}.max_tokens",
    ),
    "steps": (Annotated[int | None, typer.Option(min=1, help="Number of updates.")], "{section}.steps"),
    "save_steps": (
        Annotated[int | None, typer.Option(min=0, help="Updates between checkpoints; 0 for none.")],
        "{section}.save_steps",
    ),
    "extra": (Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting, as section.key=value.")], ""),
    "four_bit": (FourBit, "four_bit"),
    "backend": (Annotated[str | None, typer.Option(help=BACKEND)], "backend"),
    "engine": (Annotated[str | None, typer.Option(help=ENGINE)], "engine"),
    "kv_memory": (KvMemory, "kv_cache_gib"),
    "upstream": (Upstreams, "upstream"),
    "upstream_key": (UpstreamKey, ""),
    "report_to": (Annotated[str | None, typer.Option(help=REPORT_TO)], "report_to"),
    "resume": (
        Annotated[bool, typer.Option("--resume", help="Resume the run in --output (default: the newest unfinished).")],
        "",
    ),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", help="Print what would be done, with which settings, and stop.")], ""),
    "as_json": (AsJson, ""),
}
COMMON = ("config", "preset", "extra", "as_json")
ASKING = ("verifier", "seed", "limit", "max_tokens", "four_bit", "backend", "engine", "kv_memory")
UPSTREAM = ("upstream", "upstream_key")
TRAINING = ("output", "steps", "save_steps", "report_to", "resume", "dry_run")
LAST = ("dry_run", "as_json")


@dataclass(slots=True)
class Flags:
    """The shared options of a verb, as given. `values` are those that set a settings key, by that key; None is not given."""

    config: Path | None = None
    preset: str | None = None
    extra: list[str] | None = None
    output: Path | None = None
    resume: bool = False
    dry_run: bool = False
    as_json: bool = False
    upstream_key: str | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def load(self, more: dict[str, Any] | None = None) -> Settings:
        """Settings from file, preset and flags; `more` are the verb's own flags by settings key.

        Raises InputError for wrong ones, and for an upstream in a verb without --upstream: what trains must see the weights.
        """
        from sbtiny.load_settings import load_settings, parse_assignment
        from sbtiny.models.device import pick_preset, probe_device

        preset = pick_preset(probe_device()) if self.preset == "auto" else self.preset
        if self.upstream_key:
            os.environ[UPSTREAM_KEY] = self.upstream_key
        given = [(key, value) for key, value in (self.values | (more or {})).items() if value is not None]
        settings = load_settings(self.config, preset, [*map(parse_assignment, self.extra or []), *given])
        if settings.upstream and "upstream" not in self.values:
            raise InputError("upstream is for serve, chat, eval and calibrate: leave it out here, where the weights are needed")
        return settings

    def load_for_device(self, more: dict[str, Any] | None = None, run: Path | None = None) -> tuple[Settings, str | None, str]:
        """Settings, the preset they come from, and a note for the user ("" for none).

        Without --preset: the GPU's preset, or `cpu` for the bundled model. On a CPU, other models get the defaults and a note.
        `run`: its config.yaml stands in for both preset and --config where neither is given.
        """
        from sbtiny.models.aliases import resolve
        from sbtiny.models.device import pick_preset, probe_device

        preset = self.preset
        if run and preset is None and self.config is None and (run / "config.yaml").is_file():
            return replace(self, config=run / "config.yaml").load(more), None, ""
        if preset is None and (device := probe_device()).device == "cuda":
            gpu_preset = pick_preset(device)
            settings = replace(self, preset=gpu_preset).load(more)
            if resolve(settings.model).kind != "bundled":
                return settings, "auto", f"using preset {gpu_preset} for {device.name} (--preset cpu: the bundled model's settings)"
            preset = "cpu"
        settings = replace(self, preset=preset).load(more)
        if preset or self.config:
            return settings, preset, ""
        if resolve(settings.model).kind == "bundled":
            return replace(self, preset="cpu").load(more), "cpu", ""
        return settings, None, "no --preset given: these settings suit the bundled model; t4 and rtx4090 are for 1.5B to 7B models"

    def load_for_name(self, name: str, more: dict[str, Any], as_run: bool = False) -> tuple[Settings, str, Path | None]:
        """As `load_for_device` for a run or model of that name, and the run's folder. Raises InputError for an unfinished run."""
        from sbtiny import runs
        from sbtiny.models.aliases import model_of

        run = runs.find_run(name)
        settings, _, note = self.load_for_device({"model": model_of(name, self.values.get("base"))} | more, run if as_run else None)
        if run:
            runs.check_finished(run)
        return settings, note, run

    def find_resumed(self, verb: str) -> None:
        """With --resume: set `output` to the folder of the run (default: the verb's newest unfinished one), `config` to its settings."""
        from sbtiny import runs

        if not self.resume:
            return
        if self.output is None:
            self.output = runs.newest_unfinished(verb)
        elif not (self.output / "run.json").is_file():
            raise InputError("--resume needs --output with the folder of the run to go on with")
        else:
            runs.check_unclaimed(self.output)
        self.config = self.config or self.output / "config.yaml"


def with_flags(*names: str, section: str = "", questions: str = "", **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb the shared options `names`; it receives their values as `flags`, a Flags.

    The help has the verb's parameters before `flags`, the shared options, the parameters after `flags`, --dry-run and --json.
    `questions` defaults to `section`.
    """
    keys = {name: OPTIONS[name][1].format(section=section, questions=questions or section) for name in OPTIONS if name in names}

    def parameter(name: str) -> Parameter:
        kind = OPTIONS[name][0]
        default = defaults.get(name, False if get_args(kind)[0] is bool else None)
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(verb).parameters.values()]
        at = [p.name for p in own].index("flags")

        @wraps(verb)
        def command(**values: Any) -> Any:
            shared = {name: values.pop(name) for name in keys}
            settings = {key: shared.pop(name) for name, key in keys.items() if key}
            if isinstance(several := settings.get("upstream"), list):
                settings["upstream"] = ",".join(several)
            return verb(flags=Flags(**shared, values=settings), **values)

        middle, last = [parameter(name) for name in keys if name not in LAST], [parameter(name) for name in keys if name in LAST]
        command.__signature__ = Signature([*own[:at], *middle, *own[at + 1 :], *last])
        return command

    return decorate


def start_work(settings: Settings, note: str = "") -> None:
    """Print `note`, then import the backend before anything that it may patch."""
    from sbtiny import distributed
    from sbtiny.models.backend import start_backend
    from sbtiny.progress import quieten_libraries

    if note and distributed.is_main_process():
        print(note, file=sys.stderr)
    start_backend(settings.backend)
    quieten_libraries()


def validate_inputs(section: Any, task: str) -> None:
    """Raise InputError for a wrong verifier or question, before torch is imported (seconds) and weights are read (minutes)."""
    from sbtiny.tasks.load import load_questions
    from sbtiny.tasks.sources import HUB_TASKS
    from sbtiny.tasks.verify import check_references, load_verifier

    verify = load_verifier(section.verifier)
    if task not in HUB_TASKS:
        check_references(verify, load_questions(task, "train", section.limit))


def run_folder(name: str) -> Path:
    """The folder of a run by name or path. Raises InputError."""
    from sbtiny import runs

    if folder := runs.find_run(name):
        return folder
    raise InputError(f"no run {name!r}: give a run folder or its name under {runs.ROOT}/")


def print_result(value: Any, as_json: bool, show: Callable[[Any], Any] | None = None) -> None:
    """Print a result on stdout, as JSON or by `show` (default: as YAML); only in the main process."""
    from sbtiny import distributed

    if not distributed.is_main_process():
        return
    if as_json:
        print(json.dumps(value, ensure_ascii=not streams.encodes_unicode(sys.stdout)))
    elif show:
        show(value)
    else:
        import yaml

        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())  # rich would break long paths


def console(**how: bool) -> Any:
    """A rich console on stdout, for tables."""
    from rich.console import Console

    return Console(**how)


def print_dry_run(settings: Settings, stages: tuple[str, ...], preset: str | None, as_json: bool) -> None:
    """Print the resolved settings, the model's source, and the memory plan of the last stage."""
    from sbtiny.models.aliases import fill_prompt, resolve

    everything = asdict(replace(settings, prompt=fill_prompt(settings.prompt, settings.model)))
    names = ("model", "format", "seed", "four_bit", "backend", "engine", "kv_cache_gib", "prompt", *stages)
    chosen = {key: everything[key] for key in names}
    source = resolve(settings.model)
    named = {"kind": source.kind, "ref": str(source.ref)}
    print_result({"source": named, **chosen, "plan": memory_plan(settings, stages[-1], preset)}, as_json)


def memory_plan(settings: Settings, stage: str, preset: str | None) -> dict[str, Any]:
    """The memory plan of a stage. If the model's shape is unknown without its weights: the reason and the workload."""
    from sbtiny.models.device import probe_device
    from sbtiny.models.shapes import shape_of
    from sbtiny.planning.memory_plan import plan_memory
    from sbtiny.planning.workload import StageWorkload

    try:
        shape = shape_of(settings.model)
    except InputError as error:
        return {"unknown": str(error)} | StageWorkload(stage, settings).record()
    return plan_memory(stage, settings, shape, probe_device(), preset).record()


def apply_auto_micro_batch(settings: Settings, stage: str, preset: str | None) -> Settings:
    """With --preset auto, set the largest micro-batch that fits the free memory. If the shape is unknown, print so and keep it."""
    from sbtiny.models.aliases import resolve
    from sbtiny.models.device import probe_device
    from sbtiny.models.shapes import shape_of
    from sbtiny.planning.memory_plan import cap_micro_batch

    if preset != "auto":
        return settings
    resolve(settings.model)  # raises InputError for an unknown model
    try:
        return cap_micro_batch(settings, stage, shape_of(settings.model), probe_device())
    except InputError as error:
        print(f"--preset auto keeps the preset's micro-batch: {error}", file=sys.stderr)
        return settings
