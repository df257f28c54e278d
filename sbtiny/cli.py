"""The verbs. Everything heavy is imported inside them, so that help answers at once."""

import errno
import json
import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sbtiny import __version__
from sbtiny.errors import Failed, InputError

app = typer.Typer(
    name="sbtiny",
    help="Fine-tune a small reasoning model so that it says how long it will think, keeps its word, and thinks far less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Build and look at cold-start data.")
TRAIN, USE, HELP = "Train", "Use and measure", "Look"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what the user can mend by writing elsewhere
INTERRUPTED = 130
app.add_typer(data_app, name="data", rich_help_panel=TRAIN)

Config = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file (YAML).")]
Preset = Annotated[str | None, typer.Option(help="cpu, t4 or rtx4090.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Alias, hub id, folder or .gguf file (sbtiny models lists aliases).")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder to write.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Limit = Annotated[int | None, typer.Option(help="Number of questions to read.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting, as section.key=value.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Number of updates.")]
SaveSteps = Annotated[int | None, typer.Option(min=0, help="Checkpoint every so many updates; 0 for none.")]
FourBit = Annotated[
    bool | None, typer.Option("--4bit/--no-4bit", help="NF4 base weights (default: where there is a GPU).")
]


def settings_from(config: Path | None, preset: str | None, extra: list[str] | None, **flags: Any) -> Any:
    """Settings from file, preset and flags; `flags` are dotted keys with two underscores for the dot, None is not given."""
    from sbtiny.config import load, parse_assignment

    given = [(key.replace("__", "."), value) for key, value in flags.items() if value is not None]
    return load(config, preset, [*map(parse_assignment, extra or []), *given])


def look_ahead(section: Any, task: str) -> None:
    """Find a wrong verifier or file of questions before torch is imported (seconds) and weights are read (minutes)."""
    from sbtiny.tasks.sources import HUBS, load_questions
    from sbtiny.tasks.verify import load_verifier

    load_verifier(section.verifier)
    if task not in HUBS:
        load_questions(task, "train", section.limit)


def resumed(config: Path | None, output: Path | None) -> Path:
    """The settings to go on with: those the run in `output` was made with, unless another file is given."""
    if output is None or not (output / "run.json").is_file():
        raise InputError("--resume needs --output with the folder of the run to go on with")
    return config or output / "config.yaml"


def existing(name: str) -> Path:
    """The folder of a run that the user named."""
    from sbtiny import runs

    if folder := runs.find(name):
        return folder
    raise InputError(f"no run {name!r}: give a run folder or its name under {runs.ROOT}/")


def out(value: Any, as_json: bool) -> None:
    """A result on stdout: JSON alone, or YAML-like lines for a person."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        import yaml

        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())  # rich would break long paths


def show(settings: Any, sections: tuple[str, ...], as_json: bool) -> None:
    """--dry-run: the resolved settings, with what the model's name stands for."""
    from sbtiny.models.aliases import resolve

    everything = asdict(settings)
    chosen = {key: everything[key] for key in ("model", "seed", "four_bit", *sections)}
    source = resolve(settings.model)
    out({"source": {"kind": source.kind, "ref": str(source.ref)}, **chosen}, as_json)


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

    Example: [b]sbtiny demo[/b]
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve

    settings, folder = settings_from(config, preset, extra, seed=seed), output or runs.ROOT / "demo"
    resolve(settings.model)
    for section in (settings.data, settings.grpo, settings.eval):
        look_ahead(section, section.task)
    runs.check_writable(folder / "report.json")
    from sbtiny import stages
    from sbtiny.evaluation import report

    result = stages.demo(settings, folder)
    if as_json:
        out(result, True)
    else:
        report.table(result)


@data_app.command("build")
def data_build(
    file: Annotated[Path, typer.Argument(help="JSONL to write.")] = Path("data.jsonl"),
    task: Annotated[str | None, typer.Option(help="arithmetic, gsm8k, math, or a JSONL file of questions.")] = None,
    questions: Annotated[str | None, typer.Option(help="Own questions (JSONL with question and answer).")] = None,
    traces: Annotated[
        str | None, typer.Option(help="Answers written elsewhere (JSONL with question, answer, response).")
    ] = None,
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    seed: Seed = None,
    limit: Limit = None,
    extra: Set = None,
    four_bit: FourBit = None,
    as_json: AsJson = False,
) -> None:
    """Sample the model's own answers, keep the correct ones, label each with its own token count.

    Example: [b]sbtiny data build rows.jsonl --model qwen-1.5b --task gsm8k[/b]
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve
    from sbtiny.tasks.sources import read_traces

    if len([given for given in (task, questions, traces) if given]) > 1:
        raise InputError("--task, --questions and --traces exclude each other: give one of them")
    settings = settings_from(
        config,
        preset,
        extra,
        model=model,
        seed=seed,
        four_bit=four_bit,
        data__task=questions or task,
        data__limit=limit,
    )
    resolve(settings.model)
    if traces:
        read_traces(traces, settings.data.limit)
    look_ahead(settings.data, "arithmetic" if traces else settings.data.task)
    runs.check_writable(file)
    from sbtiny import stages

    harvest = stages.build_data(settings, file, traces)
    out(
        {
            "file": str(file),
            "rows": len(harvest.rows),
            "sampled": harvest.sampled,
            "wrong": harvest.wrong,
            "cut": harvest.cut,
        },
        as_json,
    )


@data_app.command("show")
def data_show(
    file: Annotated[str, typer.Argument(help="Labelled JSONL.")],
    model: Model = "tiny",
    row: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Show one row as the model meets it: trained tokens in green, the prompt dimmed.

    Example: [b]sbtiny data show rows.jsonl --row 3[/b]
    """
    from sbtiny.models.aliases import resolve
    from sbtiny.training.show import show_row

    resolve(model or "tiny")
    show_row(file, model or "tiny", row)


@app.command(rich_help_panel=TRAIN)
def sft(
    data: Annotated[str | None, typer.Option(help="Labelled rows; without it they are sampled first.")] = None,
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    output: Output = None,
    seed: Seed = None,
    limit: Limit = None,
    steps: Steps = None,
    save_steps: SaveSteps = None,
    extra: Set = None,
    four_bit: FourBit = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Cold start: teach the model to say its number, on its own correct answers.

    Example: [b]sbtiny sft --model qwen-1.5b --data rows.jsonl[/b]
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve
    from sbtiny.tasks.sources import read_rows

    settings = settings_from(
        resumed(config, output) if resume else config,
        preset,
        extra,
        model=model,
        seed=seed,
        four_bit=four_bit,
        data__limit=limit,
        sft__data=data,
        sft__steps=steps,
        sft__save_steps=save_steps,
    )
    if dry_run:
        return show(settings, ("data", "sft"), as_json)
    resolve(settings.model)
    if settings.sft.data:
        read_rows(settings.sft.data)
    else:
        look_ahead(settings.data, settings.data.task)
    if not resume:
        runs.check_free(output or runs.ROOT / "sft")
    from sbtiny import stages

    return done("sft", stages.run_sft(settings, output, resume), as_json)


@app.command(rich_help_panel=TRAIN)
def grpo(
    run: Annotated[str | None, typer.Option(help="Cold-start run to go on from (default: the newest).")] = None,
    data: Annotated[str | None, typer.Option(help="Questions (JSONL with question and answer).")] = None,
    config: Config = None,
    preset: Preset = None,
    output: Output = None,
    seed: Seed = None,
    limit: Limit = None,
    steps: Steps = None,
    save_steps: SaveSteps = None,
    extra: Set = None,
    four_bit: FourBit = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Budget-guided GRPO: reward right answers that keep to their number.

    Example: [b]sbtiny grpo --run runs/sft-20261124-101500 --steps 300[/b]
    """
    from sbtiny import runs

    settings = settings_from(
        resumed(config, output) if resume else config,
        preset,
        extra,
        seed=seed,
        four_bit=four_bit,
        grpo__limit=limit,
        grpo__data=data,
        grpo__steps=steps,
        grpo__save_steps=save_steps,
    )
    if resume and output and not run:
        run = runs.read_run(output).get("parent")
    if run or not dry_run:
        start = existing(run) if run else runs.newest("sft")
        settings = replace(settings, model=runs.read_run(start)["model"])
    if dry_run:
        return show(settings, ("grpo",), as_json)
    look_ahead(settings.grpo, settings.grpo.data or settings.grpo.task)
    if not resume:
        runs.check_free(output or runs.ROOT / "grpo")
    from sbtiny import stages

    return done("grpo", stages.run_grpo(settings, start, output, resume), as_json)


def done(verb: str, folder: Path, as_json: bool) -> None:
    following = {"sft": f"sbtiny grpo --run {folder}", "grpo": f"sbtiny eval {folder}"}[verb]
    out({"run": str(folder), "next": following}, as_json)


@app.command("eval", rich_help_panel=USE)
def evaluate(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, its name under runs/, or a model.")],
    task: Annotated[str | None, typer.Option(help="arithmetic, gsm8k, math, or a JSONL file of questions.")] = None,
    budget: Annotated[str | None, typer.Option(help="auto (its own number), N tokens, or 0.5x its own number.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also at 0.5x, 1x, 2x and 4x of its own number.")] = False,
    config: Config = None,
    preset: Preset = None,
    output: Output = None,
    seed: Seed = None,
    limit: Limit = None,
    extra: Set = None,
    four_bit: FourBit = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, length and how well the number is kept, on held-out questions.

    Example: [b]sbtiny eval runs/demo --budget 0.5x --limit 200[/b]
    """
    from sbtiny import runs
    from sbtiny.models.aliases import resolve

    settings = settings_from(
        config, preset, extra, seed=seed, four_bit=four_bit, eval__task=task, eval__budget=budget, eval__limit=limit
    )
    run = runs.find(name)
    folder = output or run or runs.ROOT / f"eval-{Path(name).name}"
    resolve(runs.read_run(run)["model"] if run else name)
    look_ahead(settings.eval, settings.eval.task)
    runs.check_writable(folder / "eval.json")
    from sbtiny import stages
    from sbtiny.evaluation import report

    result = stages.run_eval(name, settings, folder, sweep)
    if as_json:
        out(result, True)
    else:
        report.table({"model": result})


@app.command(rich_help_panel=USE)
def reward(
    file: Annotated[str, typer.Argument(help="JSONL with budget, length, correct and, if known, b_max.")],
    alpha: Annotated[
        float, typer.Option(min=0.001, help="Width of the window, 6.0 at the start of training, 0.1 at its end.")
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """The reward of given samples, part by part.

    Example: [b]sbtiny reward samples.jsonl --alpha 0.5[/b]
    """
    from sbtiny.evaluation.rewards import reward_rows, reward_table

    rows = reward_rows(file, alpha)
    if as_json:
        out(rows, True)
    else:
        Console().print(reward_table(rows))


@app.command("report", rich_help_panel=USE)
def report_(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its name under runs/.")],
    as_json: AsJson = False,
) -> None:
    """Draw the plots and write report.html of a run again.

    Example: [b]sbtiny report runs/demo[/b]
    """
    folder = existing(name)
    from sbtiny.evaluation import report

    result = report.write(folder)
    if as_json:
        out(result, True)
    else:
        report.table(result)


@app.command(rich_help_panel=HELP)
def models(as_json: AsJson = False) -> None:
    """The short names of models, and what they stand for."""
    from rich.table import Table

    from sbtiny.models.aliases import ALIASES

    if as_json:
        return out(
            [{"name": a.name, "hub_id": a.hub_id, "parameters": a.parameters, "note": a.note} for a in ALIASES], True
        )
    table = Table("name", "hub id", "parameters", "note", box=None, header_style="bold")
    for a in ALIASES:
        table.add_row(a.name, a.hub_id, f"{a.parameters / 1e6:,.0f} M", a.note)
    return Console().print(table)


def version(wanted: bool) -> None:
    if wanted:
        print(f"sbtiny {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What holds for every verb."""


def main() -> None:
    """Run the CLI: 0 done, 1 failed, 2 wrong input, 130 interrupted; one line for an error, a traceback only with --debug."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import, which already speaks
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(args=arguments, prog_name="sbtiny", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        code, message = explain(error)
        print(message, end="", file=sys.stderr)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for what went wrong, the user's to mend (2) or not (1)."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | Failed):
        return (2 if isinstance(error, InputError) else 1), f"error: {text}\n"
    if hasattr(error, "format_message"):  # typer's usage errors: unknown option, missing argument
        usage = " ".join(error.format_message().split())
        where = error.ctx.command_path if getattr(error, "ctx", None) else "sbtiny"
        return 2, f"error: {usage} ({where} --help lists what there is)\n" if usage else ""  # help was printed already
    if isinstance(error, OSError) and error.errno in DISK:
        return 2, f"error: cannot write: {text}; free space or choose another --output\n"
    return 1, f"error: {type(error).__name__}: {text} (--debug shows where)\n"
