"""Verbs that measure: eval, calibrate, reward, report."""

from pathlib import Path
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import (
    ASKING,
    COMMON,
    UPSTREAM,
    USE,
    AsJson,
    Flags,
    console,
    print_result,
    run_folder,
    start_work,
    validate_inputs,
    with_flags,
)

CALIBRATION_QUESTIONS = 500  # true coverage within about 2 % of the promised one


@app.command("eval", rich_help_panel=USE)
@with_flags(*COMMON, *ASKING, *UPSTREAM, "base", "output", section="eval")
def evaluate(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, its name under runs/, or a model.")],
    task: Annotated[str | None, typer.Option(help="arithmetic, gsm8k, math, math500, aime25, or a JSONL file of questions.")] = None,
    budget: Annotated[str | None, typer.Option(help="auto (stated by the model), N tokens, or 0.5x the stated budget.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also at 0.5x, 1x, 2x and 4x of the stated budget.")] = False,
    cuts: Annotated[bool, typer.Option("--cuts", help="Also cut at 100, 75, 50 and 25 % of the stated budget (cuts.json).")] = False,
    *,
    flags: Flags,
) -> None:
    """Accuracy, length and how well the budget is kept, on held-out questions.

    Without -c and --preset, what a run's own config.yaml says holds.

    Example: sbtiny eval runs/demo --budget 0.5x --limit 200
    """
    from sbtiny import runs

    settings, note, run = flags.load_for_name(name, {"eval.task": task, "eval.budget": budget}, as_run=True)
    folder = flags.output or run or runs.ROOT / f"eval-{Path(name).name}"
    validate_inputs(settings.eval, settings.eval.task)
    runs.check_unclaimed(folder)
    runs.check_writable(folder / "eval.json")
    start_work(settings, note)
    from sbtiny.evaluation import calibration_table, report
    from sbtiny.evaluation.run import run_eval

    result = run_eval(name, settings, folder, sweep, cuts)
    more = {part: runs.read_json(folder / f"{part}.json") for part, asked in (("sweep", sweep), ("cuts", cuts)) if asked}
    if flags.as_json:
        return print_result(result | more, True)
    report.print_eval_table(result)
    grids = [calibration_table.coverage_grid(result["coverage"])] if "coverage" in result else []
    grids += [report.comparison_grid(report.name_budgets(more["sweep"]), "given budget")] if sweep else []
    grids += [calibration_table.cuts_grid(more["cuts"])] if cuts else []
    for grid in grids:
        console().print()
        console().print(report.rich_table(grid))


@app.command(rich_help_panel=USE)
@with_flags(*COMMON, *ASKING[1:], *UPSTREAM, "base", "output", section="eval")
def calibrate(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL|GGUF", help="A run folder, its name under runs/, a model or a .gguf file.")],
    task: Annotated[str | None, typer.Option(help="arithmetic, gsm8k, math, or a JSONL file of questions.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the task (default: val); test is refused, it is for eval.")] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Hold the coverage with this probability, such as 0.95 (default: on average).")
    ] = None,
    *,
    flags: Flags,
) -> None:
    """What a stated budget is worth: tokens that 80, 90 and 95 % of answers stay within (calibration.json).

    Example: sbtiny calibrate runs/demo --confidence 0.95
    """
    from sbtiny import runs
    from sbtiny.budget.calibration import check_share
    from sbtiny.tasks.load import load_questions
    from sbtiny.tasks.sources import HUB_TASKS, SPLITS

    if confidence is not None:
        check_share("--confidence", confidence)
    # A preset may ask fewer, and eval's split is no calibration's; --set, --limit and --split win.
    usual = ["eval.split=val"] if flags.config else ["eval.split=val", f"eval.limit={CALIBRATION_QUESTIONS}"]
    flags.extra = [*usual, *(flags.extra or [])]
    settings, note, _ = flags.load_for_name(name, {"eval.task": task, "eval.split": split}, as_run=True)
    if settings.eval.task not in HUB_TASKS:
        load_questions(settings.eval.task, SPLITS[0], settings.eval.limit)  # a wrong file is told before torch is imported
    start_work(settings, note)
    from sbtiny.evaluation.calibrate import run_calibration
    from sbtiny.evaluation.calibration_file import calibration_path
    from sbtiny.evaluation.calibration_table import print_calibration

    file = calibration_path(name, flags.output, bool(settings.upstream))
    runs.check_unclaimed(file.parent)
    runs.check_writable(file)
    record = run_calibration(name, settings, confidence, flags.output)
    if flags.as_json:
        return print_result(record | {"file": str(file)}, True)
    print_calibration(record)
    e, s = settings.eval, settings.serve
    if (e.temperature, e.top_p) != (s.temperature, s.top_p):
        console().print(
            f"made at temperature {e.temperature:g}, top_p {e.top_p:g}; chat and serve answer at {s.temperature:g}, {s.top_p:g}"
        )
    console().print(f"wrote {file}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=USE)
def reward(
    file: Annotated[str, typer.Argument(help="JSONL with budget, length, correct and, if known, b_max.")],
    alpha: Annotated[
        float,
        typer.Option(min=0.001, help="Half the window's width, as a share of the budget: 6.0 at first, 0.1 in the end."),
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """The paper's reward of given samples, part by part; `sbtiny grpo` adds grpo.outside_slope and grpo.reward_peak.

    Example: sbtiny reward samples.jsonl --alpha 0.5
    """
    from sbtiny.cli.rewards import reward_rows, reward_table

    rows = reward_rows(file, alpha)
    if as_json:
        print_result(rows, True)
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
    folder = run_folder(name)
    from sbtiny.evaluation import report
    from sbtiny.evaluation.write_report import write_report

    result = write_report(folder)
    if as_json:
        print_result(result, True)
    else:
        report.print_report_table(result)
