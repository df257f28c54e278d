"""Verbs that hand the model on: export."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import USE, AsJson, DryRun, FourBit, Output, Seed, Set, existing, look_ahead, out, settings_from


@app.command(rich_help_panel=USE)
def export(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its name under runs/.")],
    gguf: Annotated[
        str,
        typer.Option(
            help="GGUF files to write, by kind: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with llama.cpp q6_k, q5_k_m, q4_k_m; or none."
        ),
    ] = "q8_0",
    form: Annotated[
        str | None, typer.Option("--format", help="The tags the files must write: solution or think, as trained (default: the run's).")
    ] = None,
    merge: Annotated[
        str, typer.Option(help="dequantized (what was trained) or original (the 16-bit weights): the base to merge onto.")
    ] = "dequantized",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32: how the merged folder is saved.")] = "float16",
    questions: Annotated[int, typer.Option(min=1, help="Questions that the trained policy and every file are asked.")] = 100,
    task: Annotated[str | None, typer.Option(help="Ask these instead of the run's own: a task, or a JSONL file.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Measure that the files are the trained policy.")] = True,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload the finished export to this repository of the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    output: Output = None,
    seed: Seed = None,
    extra: Set = None,
    four_bit: FourBit = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merged weights and GGUF files that are the trained policy and keep its budget, with the proof.

    Example: sbtiny export runs/demo --gguf q8_0,q4_k_m
    """
    from sbtiny.export import config as planning
    from sbtiny.export import push as pushing
    from sbtiny.tasks.sources import load_questions
    from sbtiny.tasks.verify import load_verifier

    run = existing(name)
    settings = settings_from(
        run / "config.yaml", None, extra, seed=seed, four_bit=four_bit, eval__task=task, eval__limit=questions
    )
    plan = planning.make(run, settings, output, form, merge, dtype, gguf, bool(settings.four_bit), check)
    if dry_run:
        return out({key: str(value) for key, value in asdict(replace(plan, settings=None)).items()}, as_json)
    if push:
        pushing.check(push)
    e, asked = settings.eval, []
    if check:
        look_ahead(e, e.task)
        asked = load_questions(e.task, e.split, e.limit, settings.seed)
    from sbtiny.export.run import export as write
    from sbtiny.export.result_table import table
    from sbtiny.progress import console, quieten_libraries

    quieten_libraries()
    result = write(plan, asked, load_verifier(e.verifier))
    if push:
        result["pushed"] = pushing.push(Path(result["folder"]), push, private)
        console.print(f"pushed to {result['pushed']}")
    return out(result, True) if as_json else table(result)
