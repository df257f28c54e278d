"""Verbs that look around: models, plan, doctor."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import COMMON, HELP, AsJson, Flags, console, print_result, with_flags
from sbtiny.errors import InputError


@app.command(rich_help_panel=HELP)
def models(as_json: AsJson = False) -> None:
    """The aliases of models, with hub ids, sizes and the instruction that their cards ask for."""
    from rich.table import Table

    from sbtiny.models.aliases import ALIASES

    if as_json:
        keys = ("name", "hub_id", "parameters", "note", "instruction")
        return print_result([{key: getattr(a, key) for key in keys} for a in ALIASES], True)
    table = Table("name", "parameters", "hub id, note", box=None, header_style="bold")
    for a in ALIASES:
        table.add_row(a.name, f"{a.parameters / 1e6:,.0f} M", "\n".join(filter(None, [a.hub_id, a.note])))
    console().print(table)
    for text in dict.fromkeys(a.instruction for a in ALIASES if a.instruction):
        names = ", ".join(a.name for a in ALIASES if a.instruction == text)
        console().print(f"prompt.instruction of {names}: {text}", soft_wrap=True, markup=False, highlight=False)


@app.command(rich_help_panel=HELP)
@with_flags(*COMMON, "model", "four_bit")
def plan(
    *,
    flags: Flags,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this device for 5 seconds and add hours.")] = False,
) -> None:
    """Memory that each stage needs against free memory, part by part. Loads no model and needs no network.

    Example: sbtiny plan --model qwen-1.5b --preset rtx4090
    """
    from sbtiny.models.device import probe_device
    from sbtiny.models.shapes import shape_of
    from sbtiny.planning.memory_plan import plan_memory
    from sbtiny.planning.workload import STAGES

    device = probe_device()
    settings, preset, _ = flags.load_for_device()
    shape = shape_of(settings.model)
    plans = [plan_memory(stage, settings, shape, device, preset) for stage in STAGES]
    stages = {p.stage: p.record() for p in plans}
    if probe and not plans[0].here:
        other = plans[0].target.name
        raise InputError(f"--probe measures what is here, {device.name}, and the plan is for {other}: leave --probe out, or run it there")
    if probe:
        from sbtiny.planning.probe import benchmark_device, estimate_hours

        speed = benchmark_device(shape)
        stages = {p.stage: stages[p.stage] | {"hours_at_least": round(estimate_hours(p, shape, speed), 3)} for p in plans}
    report = {"model": settings.model, "shape": asdict(shape), "stages": stages}
    print_result(report, flags.as_json, lambda _: console().print(memory_plan_table(settings.model, stages)))


def memory_plan_table(model: str, stages: dict[str, dict[str, Any]]) -> Any:
    """Table of the stages: GiB by part, then totals."""
    from rich.table import Table

    first = next(iter(stages.values()))
    where = f"{first['device']}{'' if first['here'] else ' (not this machine)'}, {first['dtype']}"
    table = Table("GiB", *stages, box=None, header_style="bold", title=f"{model} on {where}{', 4-bit' if first['four_bit'] else ''}")
    for part in first["parts"]:
        table.add_row(part.replace("_", " "), *(f"{f['parts'][part]:.2f}" for f in stages.values()))
    table.add_section()
    passes = ("micro_batch", "gradient_accumulation", "largest_micro_batch")
    for key in ("peak_gb", "free_gb", "fits", "slots", "max_new_tokens", *passes, "hours_at_least"):
        if key in first:
            table.add_row(key.replace("_gb", "").replace("_", " "), *(str(f[key]) for f in stages.values()))
    for key in first["tokens_at_most"]:
        table.add_row(f"tokens {key}, at most", *(f"{f['tokens_at_most'][key]:,}" for f in stages.values()))
    return table


@app.command(rich_help_panel=HELP)
def doctor(as_json: AsJson = False) -> None:
    """Versions against the tested set, the device, extras, disk: what is installed and how to get the rest.

    Example: sbtiny doctor --json
    """
    from sbtiny.cli.doctor import run_checks, to_record

    findings = run_checks()
    report = to_record(findings)
    print_result(report, as_json, lambda _: print_findings(findings))
    raise typer.Exit(0 if report["ok"] else 1)


def print_findings(findings: list[Any]) -> None:
    from rich.markup import escape

    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    screen = console(highlight=False, soft_wrap=True)
    for f in findings:
        hint = f"  -> {f.mend}" if f.mend else ""
        screen.print(f"[{colours[f.state]}]{f.state:5}[/]{f.section:10}{f.name:18}{escape(f.found + hint)}")
