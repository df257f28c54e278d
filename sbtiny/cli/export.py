"""The verb that writes a trained model: export."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import USE, Flags, print_result, run_folder, validate_inputs, with_flags

CHECK_QUESTIONS = 100


@app.command(rich_help_panel=USE)
@with_flags("base", "output", "seed", "extra", "dry_run", "as_json")
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
    questions: Annotated[int | None, typer.Option(min=1, help="Questions that the policy and every file are asked (default: 100).")] = None,
    task: Annotated[str | None, typer.Option(help="Ask these instead of the run's own: a task, or a JSONL file.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Measure that the files are the trained policy.")] = True,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Calibrate every GGUF file through llama.cpp.")] = False,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload the finished export to this repository of the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    *,
    flags: Flags,
) -> None:
    """Merged weights and GGUF files that are the trained policy and keep its budget, with the proof.

    Example: sbtiny export runs/demo --gguf q8_0,q4_k_m
    """
    from sbtiny.export import config as export_config
    from sbtiny.export import push as hub
    from sbtiny.tasks.load import load_questions
    from sbtiny.tasks.verify import load_verifier

    run = run_folder(name)
    flags.config = run / "config.yaml"
    flags.extra = [f"eval.limit={CHECK_QUESTIONS}", *(flags.extra or [])]  # an evaluation asks more; --set and --questions win
    settings = flags.load({"eval.task": task, "eval.limit": questions})
    e = settings.eval
    plan = export_config.make_config(run, settings, flags.output, form, merge, dtype, gguf, bool(settings.four_bit), check)
    if flags.dry_run:
        return print_result({key: str(value) for key, value in asdict(replace(plan, settings=None)).items()}, flags.as_json)
    if push:
        hub.check_hub_login(push)
    if check:
        validate_inputs(e, e.task)
    questions_asked = load_questions(e.task, e.split, e.limit, settings.seed) if check else []
    from sbtiny.export.calibrate import calibrate_files, check_questions
    from sbtiny.export.result_table import table
    from sbtiny.export.run import export_run
    from sbtiny.progress import quieten_libraries

    if calibrate:
        check_questions(plan)
    quieten_libraries()
    result = export_run(plan, questions_asked, load_verifier(e.verifier))
    if calibrate:
        result["calibrations"] = calibrate_files(plan, Path(result["folder"]))
    if push:
        result["pushed"] = hub.push(Path(result["folder"]), push, private)
    return print_result(result, flags.as_json, table)
