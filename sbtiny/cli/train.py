"""Verbs that train: demo, sft, grpo."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import (
    TRAIN,
    AsJson,
    Backend,
    Config,
    DryRun,
    Engine,
    Format,
    FourBit,
    KvMemory,
    Limit,
    Model,
    Output,
    Preset,
    ReportTo,
    Resume,
    SaveSteps,
    Seed,
    Set,
    Steps,
    Verifier,
    begun,
    existing,
    fit,
    look_ahead,
    out,
    resumed,
    settings_from,
    settings_here,
    show,
)
from sbtiny.errors import InputError


@app.command(rich_help_panel=TRAIN)
def demo(
    config: Config = None,
    preset: Preset = "cpu",
    output: Output = None,
    seed: Seed = None,
    extra: Set = None,
    as_json: AsJson = False,
) -> None:
    """The whole pipeline on the bundled model: base, cold start, GRPO, a report. Minutes on two CPU cores.

    Example: sbtiny demo
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve

    settings, folder = settings_from(config, preset, extra, seed=seed), output or runs.ROOT / "demo"
    resolve(settings.model)
    for section in (settings.data, settings.grpo, settings.eval):
        look_ahead(section, section.task)
    runs.check_unclaimed(folder)
    runs.check_writable(folder / "report.json")
    begun(settings)
    from sbtiny.pipeline import demo as pipeline
    from sbtiny.evaluation import report

    result = pipeline.run(settings, folder)
    if as_json:
        out(result, True)
    else:
        report.table(result)


@app.command(rich_help_panel=TRAIN)
def sft(
    data: Annotated[str | None, typer.Option(help="Labelled rows; without it they are sampled first.")] = None,
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    output: Output = None,
    form: Format = None,
    verifier: Verifier = None,
    seed: Seed = None,
    limit: Limit = None,
    steps: Steps = None,
    save_steps: SaveSteps = None,
    extra: Set = None,
    four_bit: FourBit = None,
    backend: Backend = None,
    engine: Engine = None,
    kv_memory: KvMemory = None,
    report_to: ReportTo = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Cold start: teach the model to say its number, on its own correct answers.

    Example: sbtiny sft --model qwen-1.5b --data rows.jsonl
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve
    from sbtiny.training.arguments import ensure_reporter
    from sbtiny.coldstart.rows import read_labelled

    if resume:
        output = resumed("sft", output)
        config = config or output / "config.yaml"
    settings, preset, note = settings_here(
        config,
        preset,
        extra,
        model=model,
        format=form,
        seed=seed,
        four_bit=four_bit,
        backend=backend,
        engine=engine,
        kv_memory=kv_memory,
        report_to=report_to,
        data__limit=limit,
        data__verifier=verifier,
        sft__data=data,
        sft__steps=steps,
        sft__save_steps=save_steps,
    )
    settings = fit(settings, "sft", preset)
    if dry_run:
        return show(settings, ("data", "sft"), preset, as_json)
    resolve(settings.model)
    if settings.sft.data:
        read_labelled(settings.sft.data)
    else:
        look_ahead(settings.data, settings.data.task)
    ensure_reporter(settings.report_to)
    if not resume:
        runs.check_free(output or runs.ROOT / "sft")
    stages = begun(settings, note)
    return done("sft", stages.run_sft(settings, output, resume), as_json)


@app.command(rich_help_panel=TRAIN)
def grpo(
    run: Annotated[str | None, typer.Option(help="Cold-start run to go on from (default: the newest).")] = None,
    data: Annotated[str | None, typer.Option(help="Questions (JSONL with question and answer).")] = None,
    config: Config = None,
    preset: Preset = None,
    output: Output = None,
    verifier: Verifier = None,
    seed: Seed = None,
    limit: Limit = None,
    steps: Steps = None,
    save_steps: SaveSteps = None,
    extra: Set = None,
    four_bit: FourBit = None,
    backend: Backend = None,
    engine: Engine = None,
    kv_memory: KvMemory = None,
    report_to: ReportTo = None,
    resume: Resume = False,
    cut_share: Annotated[
        float | None, typer.Option(help="Share of groups that are cut below their own number and learn to finish.")
    ] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="Sample a few groups, say whether it will learn, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even where the preflight finds it hopeless.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Budget-guided GRPO: reward right answers that keep to their number.

    Example: sbtiny grpo --run runs/sft-20261124-101500 --steps 300
    """
    from sbtiny import runs
    from sbtiny.training.arguments import ensure_reporter

    if resume:
        output = resumed("grpo", output)
        config = config or output / "config.yaml"
    start = cold_start(run, output if resume else None, dry_run)
    model = runs.read_run(start)["model"] if start else None
    settings, preset, note = settings_here(
        config,
        preset,
        extra,
        model=model,
        seed=seed,
        four_bit=four_bit,
        backend=backend,
        engine=engine,
        kv_memory=kv_memory,
        report_to=report_to,
        grpo__limit=limit,
        grpo__verifier=verifier,
        grpo__data=data,
        grpo__steps=steps,
        grpo__save_steps=save_steps,
        grpo__cut_share=cut_share,
    )
    settings = fit(settings, "grpo", preset)
    if dry_run:
        return show(settings, ("grpo",), preset, as_json)
    look_ahead(settings.grpo, settings.grpo.data or settings.grpo.task)
    ensure_reporter(settings.report_to)
    if not resume and not preflight:
        runs.check_free(output or runs.ROOT / "grpo")
    stages = begun(settings, note)
    if preflight:
        look = stages.run_preflight(settings, start)
        out(look, as_json)
        return stages.preflight.insist(look, force)
    return done("grpo", stages.run_grpo(settings, start, output, resume, force), as_json)


def cold_start(run: str | None, resumed_run: Path | None, dry_run: bool) -> Path | None:
    """The run that GRPO goes on from: the one told, the parent of a resumed one, the newest; a dry run needs none."""
    from sbtiny import runs

    parent = runs.read_run(resumed_run).get("parent") if resumed_run else None
    if run and parent and existing(run).resolve() != Path(parent).resolve():
        raise InputError(f"--run is {run}, but {resumed_run} went on from {parent}: leave --run out, or start a new run without --resume")
    run = run or parent
    if run:
        return existing(run)
    return None if dry_run else runs.newest("sft")


def done(verb: str, folder: Path, as_json: bool) -> None:
    following = {"sft": "sbtiny grpo --run ", "grpo": "sbtiny eval "}[verb] + quote(str(folder))
    out({"run": str(folder), "next": following}, as_json)
