"""Verbs that measure: eval, reward, report."""

from pathlib import Path
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import (
    USE,
    AsJson,
    Backend,
    Config,
    Engine,
    FourBit,
    KvMemory,
    Limit,
    Output,
    Preset,
    Seed,
    Set,
    Verifier,
    begun,
    console,
    existing,
    look_ahead,
    out,
    settings_here,
)


@app.command("eval", rich_help_panel=USE)
def evaluate(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, its name under runs/, or a model.")],
    task: Annotated[str | None, typer.Option(help="arithmetic, gsm8k, math, math500, aime25, or a JSONL file of questions.")] = None,
    budget: Annotated[str | None, typer.Option(help="auto (its own number), N tokens, or 0.5x its own number.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also at 0.5x, 1x, 2x and 4x of its own number.")] = False,
    cuts: Annotated[
        bool, typer.Option("--cuts", help="Also cut and wrapped up at 75, 50 and 25 % of its own number (cuts.json).")
    ] = False,
    config: Config = None,
    preset: Preset = None,
    output: Output = None,
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
    """Accuracy, length and how well the number is kept, on held-out questions.

    Example: sbtiny eval runs/demo --budget 0.5x --limit 200
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve

    run = runs.find(name)
    model = runs.read_run(run)["model"] if run else name
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
        eval__task=task,
        eval__budget=budget,
        eval__limit=limit,
        eval__verifier=verifier,
    )
    folder = output or run or runs.ROOT / f"eval-{Path(name).name}"
    resolve(model)
    look_ahead(settings.eval, settings.eval.task)
    if run:
        runs.check_finished(run)
    runs.check_unclaimed(folder)
    runs.check_writable(folder / "eval.json")
    stages = begun(settings, note)
    from sbtiny.evaluation import report
    from sbtiny.evaluation import cuts as cutting

    result = stages.run_eval(name, settings, folder, sweep, cuts)
    if as_json:
        return out(result, True)
    report.table({"model": result})
    if cuts:
        console().print()
        cutting.table(runs.read_json(folder / "cuts.json"))


@app.command(rich_help_panel=USE)
def reward(
    file: Annotated[str, typer.Argument(help="JSONL with budget, length, correct and, if known, b_max.")],
    alpha: Annotated[
        float, typer.Option(min=0.001, help="Width of the window, 6.0 at the start of training, 0.1 at its end.")
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """The reward of given samples, part by part.

    Example: sbtiny reward samples.jsonl --alpha 0.5
    """
    from sbtiny.cli.rewards import reward_rows, reward_table

    rows = reward_rows(file, alpha)
    if as_json:
        out(rows, True)
    else:
        console().print(reward_table(rows))


@app.command("report", rich_help_panel=USE)
def report_(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its name under runs/.")],
    as_json: AsJson = False,
) -> None:
    """Draw the plots and write report.html of a run again.

    Example: sbtiny report runs/demo
    """
    folder = existing(name)
    from sbtiny.evaluation import report

    result = report.write(folder)
    if as_json:
        out(result, True)
    else:
        report.table(result)
