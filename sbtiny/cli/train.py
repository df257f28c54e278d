"""Verbs that train: demo, sft, grpo."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import (
    ASKING,
    COMMON,
    TRAIN,
    TRAINING,
    Flags,
    apply_auto_micro_batch,
    print_dry_run,
    print_result,
    run_folder,
    start_work,
    validate_inputs,
    with_flags,
)
from sbtiny.config import Settings
from sbtiny.errors import InputError


@app.command(rich_help_panel=TRAIN)
@with_flags(*COMMON, "output", "seed", "dry_run", preset="cpu")
def demo(*, flags: Flags) -> None:
    """The whole pipeline on the bundled model: base, cold start, GRPO, a report. Minutes on two CPU cores.

    Example: sbtiny demo
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve
    from sbtiny.tasks.load import load_questions
    from sbtiny.tasks.sources import TASKS

    settings, folder = flags.load(), flags.output or runs.ROOT / "demo"
    if flags.dry_run:
        return print_dry_run(settings, ("data", "sft", "eval", "grpo"), flags.preset, flags.as_json)
    resolve(settings.model)
    for section in (settings.data, settings.grpo, settings.eval):
        validate_inputs(section, section.task)
    if settings.eval.task not in TASKS:
        raise InputError(f"eval.task is {settings.eval.task}: a demo calibrates on the val split of a named task, and a file has none")
    load_questions(settings.eval.task, "val", 1)  # some sets have test questions alone
    check_run_name(folder)
    runs.check_unclaimed(folder)
    runs.check_writable(folder / "report.json")
    start_work(settings)
    from sbtiny.evaluation.report import print_report_table
    from sbtiny.pipeline.demo import run_demo

    print_result(run_demo(settings, folder), flags.as_json, print_report_table)


@app.command(rich_help_panel=TRAIN)
@with_flags(*COMMON, *ASKING, *TRAINING, "model", "base", "format", section="sft", questions="data")
def sft(
    data: Annotated[str | None, typer.Option(help="Labelled rows; without it they are sampled first.")] = None,
    run: Annotated[str | None, typer.Option(help="Run whose adapter is trained on (default: a new adapter).")] = None,
    *,
    flags: Flags,
) -> None:
    """Cold start: teach the model to state a budget, on its own correct answers.

    Example: sbtiny sft --model qwen-1.5b --data rows.jsonl
    """
    from sbtiny.coldstart.rows import read_labelled
    from sbtiny.models.aliases import resolve
    from sbtiny.training.arguments import require_reporter

    flags.find_resumed("sft")
    start = find_start(run, flags.output if flags.resume else None)
    if start and flags.values.get("model"):
        raise InputError(f"--run goes on from {start}, which has its model: leave --model out")
    if not start and flags.values.get("base"):
        raise InputError("--base says where the model of --run is: without --run name the model by --model")
    settings, preset, note = flags.load_for_device(inherit_model(start, flags) | {"sft.rows": data})
    sampling = [name for name in ("verifier", "limit", "max-tokens") if flags.values.get(f"data.{name.replace('-', '_')}") is not None]
    if settings.sft.rows and sampling:
        raise InputError(f"--{sampling[0]} is for rows that are sampled, and {settings.sft.rows} is trained on whole: leave it out")
    settings = apply_auto_micro_batch(settings, "sft", preset)
    shown = with_kept_prompt(settings, start)
    if flags.dry_run:
        return print_dry_run(shown, ("data", "sft"), preset, flags.as_json)
    resolve(settings.model)
    if settings.sft.rows:
        read_labelled(settings.sft.rows)
    else:
        validate_inputs(settings.data, settings.data.task)
    require_reporter(settings.report_to)
    if not flags.resume:
        check_can_begin(flags.output)
    start_work(settings, note)
    from sbtiny.coldstart.run import run_sft

    return print_next_step("sft", run_sft(settings, flags.output, flags.resume, start), flags.as_json)


@app.command(rich_help_panel=TRAIN)
@with_flags(*COMMON, *ASKING, *TRAINING, "base", section="grpo")
def grpo(
    run: Annotated[str | None, typer.Option(help="Cold-start run to start from (default: the newest).")] = None,
    data: Annotated[str | None, typer.Option(help="Questions (JSONL with question and answer).")] = None,
    *,
    flags: Flags,
    cut_share: Annotated[
        float | None, typer.Option(help="Share of groups that are cut below their stated budget and learn to finish.")
    ] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="Sample a few groups, report whether it will learn, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even where the preflight finds it hopeless.")] = False,
) -> None:
    """Budget-guided GRPO: reward right answers that keep to their budget.

    Example: sbtiny grpo --run runs/sft-20261124-101500 --steps 300
    """
    from sbtiny import runs
    from sbtiny.training.arguments import require_reporter

    flags.find_resumed("grpo")
    start = find_start(run, flags.output if flags.resume else None) or (None if flags.dry_run else runs.newest_run("sft"))
    settings, preset, note = flags.load_for_device(inherit_model(start, flags) | {"grpo.questions": data, "grpo.cut_share": cut_share})
    settings = apply_auto_micro_batch(settings, "grpo", preset)
    shown = with_kept_prompt(settings, start)
    if flags.dry_run:
        return print_dry_run(shown, ("grpo",), preset, flags.as_json)
    validate_inputs(settings.grpo, settings.grpo.questions or settings.grpo.task)
    require_reporter(settings.report_to)
    if not flags.resume and not preflight:
        check_can_begin(flags.output)
    start_work(settings, note)
    from sbtiny.grpo.preflight import raise_if_hopeless
    from sbtiny.grpo.run import run_grpo, run_preflight

    if preflight:
        preflight_result = run_preflight(settings, start)
        print_result(preflight_result, flags.as_json)
        return raise_if_hopeless(preflight_result, force)
    return print_next_step("grpo", run_grpo(settings, start, flags.output, flags.resume, force), flags.as_json)


def check_can_begin(folder: Path | None) -> None:
    """Raise InputError if a run cannot begin in `folder`; None is a new one under runs/."""
    from sbtiny import runs

    check_run_name(folder)
    runs.check_can_begin(folder)


def check_run_name(folder: Path | None) -> None:
    """Raise InputError for a run under runs/ that would have the name of a model: by that name the model could not be found again."""
    from sbtiny import runs
    from sbtiny.models.aliases import find_alias

    if folder and find_alias(folder.name) and folder.parent.resolve() == runs.ROOT.resolve():
        raise InputError(f"{folder.name} is the name of a model, so {folder} cannot be found by its name: name the run otherwise")


def find_start(run: str | None, resumed_run: Path | None) -> Path | None:
    """The run whose adapter is trained on: `run`, else the parent of the resumed run. None without either."""
    from sbtiny import runs

    parent = runs.read_run(resumed_run).get("parent") if resumed_run else None
    if run and parent and run_folder(run).resolve() != Path(parent).resolve():
        raise InputError(f"--run is {run}, but {resumed_run} went on from {parent}: leave --run out, or start a new run without --resume")
    return run_folder(found) if (found := run or parent) else None


def inherit_model(start: Path | None, flags: Flags) -> dict[str, str]:
    """Model and format of the run that is trained on, by settings key. Raises InputError where its model is not here."""
    from sbtiny import runs
    from sbtiny.models.aliases import model_of

    return {"model": model_of(str(start), flags.values.get("base")), "format": runs.read_run(start)["format"]} if start else {}


def with_kept_prompt(settings: Settings, start: Path | None) -> Settings:
    """The settings with the prompt of the run that is trained on. Raises InputError where another one is set."""
    from sbtiny import runs

    return replace(settings, prompt=runs.kept_prompt(start, settings.prompt)) if start else settings


def print_next_step(verb: str, folder: Path, as_json: bool) -> None:
    next_command = {"sft": "sbtiny grpo --run ", "grpo": "sbtiny eval "}[verb] + quote(str(folder))
    print_result({"run": str(folder), "next": next_command}, as_json)
