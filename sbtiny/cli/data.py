"""Verbs about cold-start data: data build, data show."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import (
    TRAIN,
    AsJson,
    Backend,
    Config,
    Engine,
    FourBit,
    KvMemory,
    Limit,
    Model,
    Preset,
    Seed,
    Set,
    Verifier,
    begun,
    look_ahead,
    out,
    settings_here,
)
from sbtiny.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Build and look at cold-start data.")
app.add_typer(data_app, name="data", rich_help_panel=TRAIN)


@data_app.command("build")
def data_build(
    file: Annotated[Path, typer.Argument(help="JSONL to write.")] = Path("data.jsonl"),
    task: Annotated[str | None, typer.Option(help="arithmetic, gsm8k, math, still3, s1k, or a file of questions.")] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Own questions: question and answer, or another common shape; .jsonl, .json, .csv (also .gz) or .parquet."),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(help="Answers written elsewhere: question, answer, response; problem, solution; prompt, completion; messages; ..."),
    ] = None,
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    verifier: Verifier = None,
    seed: Seed = None,
    limit: Limit = None,
    extra: Set = None,
    four_bit: FourBit = None,
    backend: Backend = None,
    engine: Engine = None,
    kv_memory: KvMemory = None,
    as_json: AsJson = False,
) -> None:
    """Sample the model's own answers, keep the correct ones, label each with its own token count.

    Example: sbtiny data build rows.jsonl --model qwen-1.5b --task gsm8k
    """
    from sbtiny import locks, runs
    from sbtiny.models.aliases import resolve
    from sbtiny.tasks.traces import read_traces, unjudged
    from sbtiny.tasks.verify import check_references, load_verifier

    if len([given for given in (task, questions, traces) if given]) > 1:
        raise InputError("--task, --questions and --traces exclude each other: give one of them")
    settings, _, note = settings_here(
        config,
        preset,
        extra,
        model=model,
        seed=seed,
        four_bit=four_bit,
        backend=backend,
        engine=engine,
        kv_memory=kv_memory,
        data__task=questions or task,
        data__limit=limit,
        data__verifier=verifier,
    )
    resolve(settings.model)
    if traces:
        check_references(load_verifier(settings.data.verifier), unjudged(read_traces(traces)[: settings.data.limit]))
    else:
        look_ahead(settings.data, settings.data.task)
    locks.check(locks.beside(file), file)
    runs.check_writable(file)
    stages = begun(settings, note)
    try:
        harvest = stages.build_data(settings, file, traces)
    except KeyboardInterrupt:
        if file.with_name(f"{file.name}.part").exists():
            print(f"\nstopped; the same command goes on from {file}.part", file=sys.stderr)
        raise
    out(summary(file, harvest), as_json)


def summary(file: Path, harvest: Any) -> dict[str, Any]:
    """What came of a build: counts, and lengths by level."""
    counts = {name: getattr(harvest, name) for name in ("sampled", "wrong", "cut", "spare", "leaked")}
    counts |= {"turn_ends": harvest.turn_ends} if harvest.turn_ends else {}
    return {"file": str(file), "rows": len(harvest.rows), **counts, "levels": harvest.levels()}


@data_app.command("show")
def data_show(
    file: Annotated[str, typer.Argument(help="Labelled JSONL.")],
    model: Model = "tiny",
    row: Annotated[int, typer.Option(min=1)] = 1,
    form: Annotated[str, typer.Option("--format", help="The tags to show it in: solution or think.")] = "solution",
) -> None:
    """Show one row as the model meets it: trained tokens in green, the prompt dimmed.

    Example: sbtiny data show rows.jsonl --row 3
    """
    from sbtiny.budget.protocol import format_named
    from sbtiny.models.aliases import resolve
    from sbtiny.coldstart.row_preview import show_row

    resolve(model or "tiny")
    show_row(file, model or "tiny", row, format_named(form))
