"""Verbs about cold-start data: data build, data show."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import ASKING, COMMON, TRAIN, Flags, print_result, start_work, validate_inputs, with_flags
from sbtiny.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Build and look at cold-start data.")
app.add_typer(data_app, name="data", rich_help_panel=TRAIN)


@data_app.command("build")
@with_flags(*COMMON, *ASKING, "model", section="data")
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
    *,
    flags: Flags,
) -> None:
    """Sample the model's own answers, keep the correct ones, label each with its own token count.

    Example: sbtiny data build rows.jsonl --model qwen-1.5b --task gsm8k
    """
    from sbtiny import locks, runs
    from sbtiny.models.aliases import resolve
    from sbtiny.tasks.row_files import file_format
    from sbtiny.tasks.traces import read_traces, unverified_questions
    from sbtiny.tasks.verify import check_references, load_verifier

    if len([source for source in (task, questions, traces) if source]) > 1:
        raise InputError("--task, --questions and --traces exclude each other: give one of them")
    settings, _, note = flags.load_for_device({"data.task": questions or task})
    resolve(settings.model)
    if traces:
        check_references(load_verifier(settings.data.verifier), unverified_questions(read_traces(traces)[: settings.data.limit]))
    else:
        validate_inputs(settings.data, settings.data.task)
    if file_format(file.name) in (".csv", ".parquet") or file.suffix == ".gz":
        raise InputError(f"{file} would be written as JSON Lines and read as its name says: call it {file.name.partition('.')[0]}.jsonl")
    locks.raise_if_locked(locks.lock_path(file), file)
    runs.check_writable(file, questions, task, traces)
    start_work(settings, note)
    from sbtiny.coldstart.build import build_data

    try:
        harvest = build_data(settings, file, traces)
    except KeyboardInterrupt:
        if file.with_name(f"{file.name}.part").exists():
            print(f"\nstopped; the same command goes on from {file}.part", file=sys.stderr)
        raise
    print_result(build_summary(file, harvest), flags.as_json)


def build_summary(file: Path, harvest: Any) -> dict[str, Any]:
    """Counts of a build, and lengths by level."""
    counts = {name: getattr(harvest, name) for name in ("sampled", "wrong", "cut", "spare", "leaked")}
    counts |= {name: value for name in ("turn_ends", "max_tokens") if (value := getattr(harvest, name))}
    return {"file": str(file), "rows": len(harvest.rows), **counts, "levels": harvest.levels()}


@data_app.command("show")
@with_flags("config", "extra", "model", "format")
def data_show(
    file: Annotated[str, typer.Argument(help="Labelled JSONL.")],
    row: Annotated[int, typer.Option(min=1)] = 1,
    *,
    flags: Flags,
) -> None:
    """Show one row as the model reads it: trained tokens in green, the prompt dimmed.

    Example: sbtiny data show rows.jsonl --row 3 --model qwen-1.5b
    """
    from sbtiny.budget.protocol import FORMATS
    from sbtiny.coldstart.row_preview import show_row
    from sbtiny.models.aliases import fill_prompt, resolve

    settings = flags.load()
    resolve(settings.model)
    show_row(file, settings.model, row, FORMATS[settings.format], fill_prompt(settings.prompt, settings.model))
