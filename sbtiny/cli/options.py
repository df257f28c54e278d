"""What the verbs share: their options, and the way from options to settings. Imports nothing heavy."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from sbtiny.cli import streams
from sbtiny.errors import InputError

TRAIN, USE, HELP = "Train", "Use and measure", "Look"  # panels of the help

Config = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file (YAML).")]
Preset = Annotated[str | None, typer.Option(help="cpu, t4, rtx4090, or auto: by what is here.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Alias, hub id, folder or .gguf file (sbtiny models lists aliases).")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder to write.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Limit = Annotated[int | None, typer.Option(help="Number of questions to read.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting, as section.key=value.")]
Verifier = Annotated[
    str | None, typer.Option(help="auto, numeric, math, choice, exact, regex, or a function of your own: my.py:check.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --output (default: the newest unfinished).")]
Steps = Annotated[int | None, typer.Option(min=1, help="Number of updates.")]
SaveSteps = Annotated[int | None, typer.Option(min=0, help="Checkpoint every so many updates; 0 for none.")]
FourBit = Annotated[
    bool | None, typer.Option("--4bit/--no-4bit", help="NF4 base weights (default: where there is a GPU).")
]
Format = Annotated[str | None, typer.Option("--format", help="Tags to teach: solution (the paper's), or think, with the answer behind it.")]
Backend = Annotated[
    str | None, typer.Option(help="What loads and trains: auto (unsloth where it can run), unsloth, or transformers.")
]
Engine = Annotated[str | None, typer.Option(help="What decodes: ours, generate (any model of transformers, slower), or vllm.")]
ReportTo = Annotated[str | None, typer.Option(help="Training curves also go to tensorboard, trackio or wandb (default: none).")]
KvMemory = Annotated[
    float | None,
    typer.Option(metavar="GIB", help="Memory for answers under way (default: most of what is free); slots that do not fit wait."),
]


def settings_from(config: Path | None, preset: str | None, extra: list[str] | None, **flags: Any) -> Any:
    """Settings from file, preset and flags; `flags` are dotted keys with two underscores for the dot, None is not given."""
    from sbtiny.config import load, parse_assignment
    from sbtiny.models.device import glance, pick_preset

    if preset == "auto":
        preset = pick_preset(glance())
    given = [(key.replace("__", "."), value) for key, value in flags.items() if value is not None]
    return load(config, preset, [*map(parse_assignment, extra or []), *given])


def settings_here(config: Path | None, preset: str | None, extra: list[str] | None, **flags: Any) -> tuple[Any, str | None, str]:
    """`settings_from`, the preset they come from, and a line for the user where nobody named one.

    It is then the one of the GPU that is here, but for the bundled model, which has its own. On a processor the settings are the bundled
    model's; of another model that is said.
    """
    from sbtiny.models.aliases import resolve
    from sbtiny.models.device import glance, pick_preset

    if preset is None and (seen := glance()).device == "cuda":
        found = pick_preset(seen)
        settings = settings_from(config, found, extra, **flags)
        if resolve(settings.model).kind != "bundled":
            return settings, "auto", f"preset {found}, for {seen.name} is here (--preset cpu: the bundled model's settings)"
        preset = "cpu"
    settings = settings_from(config, preset, extra, **flags)
    others = preset is None and config is None and resolve(settings.model).kind != "bundled"
    note = "no --preset: these are the bundled model's settings; t4 and rtx4090 have those of models of billions" if others else ""
    return settings, preset, note


def begun(settings: Any, note: str = "") -> ModuleType:
    """The stages, imported after the backend, which may be one that patches what they import; `note` is told before the work begins."""
    from sbtiny.models.load import start_backend
    from sbtiny import distributed

    if note and distributed.first():
        print(note, file=sys.stderr)
    start_backend(settings.backend)
    from sbtiny.pipeline import stages
    from sbtiny.progress import quieten_libraries

    quieten_libraries()
    return stages


def look_ahead(section: Any, task: str) -> None:
    """Find a wrong verifier or question before torch is imported (seconds) and weights are read (minutes)."""
    from sbtiny.tasks.sources import HUB_TASKS, load_questions
    from sbtiny.tasks.verify import check_references, load_verifier

    verify = load_verifier(section.verifier)
    if task not in HUB_TASKS:
        check_references(verify, load_questions(task, "train", section.limit))


def resumed(verb: str, output: Path | None) -> Path:
    """The folder of the run to go on with: `output`, else the newest unfinished run of that verb."""
    from sbtiny import runs

    if output is None:
        return runs.unfinished(verb)
    if not (output / "run.json").is_file():
        raise InputError("--resume needs --output with the folder of the run to go on with")
    runs.check_unclaimed(output)
    return output


def existing(name: str) -> Path:
    """The folder of a run that the user named."""
    from sbtiny import runs

    if folder := runs.find(name):
        return folder
    raise InputError(f"no run {name!r}: give a run folder or its name under {runs.ROOT}/")


def out(value: Any, as_json: bool) -> None:
    """A result on stdout: JSON alone, or YAML-like lines for a person; of several processes the first one speaks."""
    from sbtiny import distributed

    if not distributed.first():
        return
    if as_json:
        print(json.dumps(value, ensure_ascii=not streams.is_unicode(sys.stdout)))
    else:
        import yaml

        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())  # rich would break long paths


def console(**how: bool) -> Any:
    """stdout for tables."""
    from rich.console import Console

    return Console(**how)


def show(settings: Any, stages: tuple[str, ...], preset: str | None, as_json: bool) -> None:
    """--dry-run: the resolved settings, what the model's name stands for, and the memory that the last stage will take."""
    from sbtiny.models.aliases import resolve

    everything = asdict(settings)
    chosen = {key: everything[key] for key in ("model", "format", "seed", "four_bit", "backend", "engine", "kv_memory", *stages)}
    source = resolve(settings.model)
    named = {"kind": source.kind, "ref": str(source.ref)}
    out({"source": named, **chosen, "plan": planned(settings, stages[-1], preset)}, as_json)


def planned(settings: Any, stage: str, preset: str | None) -> dict[str, Any]:
    """The plan of a stage; for a model whose shape only its weights tell, why there is none, and what does not depend on it."""
    from sbtiny.models.device import glance
    from sbtiny.planning.memory_plan import plan
    from sbtiny.models.shapes import shape_of
    from sbtiny.planning.workload import Work

    try:
        shape = shape_of(settings.model)
    except InputError as error:
        return {"unknown": str(error)} | Work(stage, settings).record()
    return plan(stage, settings, shape, glance(), preset).record()


def fit(settings: Any, stage: str, preset: str | None) -> Any:
    """With --preset auto, the largest micro-batch that fits what is free here (the preset's where the shape is unknown, which is said)."""
    from sbtiny.models.aliases import resolve
    from sbtiny.models.device import glance
    from sbtiny.planning.memory_plan import fitted
    from sbtiny.models.shapes import shape_of

    if preset != "auto":
        return settings
    resolve(settings.model)  # a name that is none is wrong input
    try:
        return fitted(settings, stage, shape_of(settings.model), glance())
    except InputError as error:
        print(f"--preset auto keeps the preset's micro-batch: {error}", file=sys.stderr)
        return settings
