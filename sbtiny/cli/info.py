"""Verbs that look around: models, plan, doctor."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import HELP, AsJson, Config, FourBit, Model, Preset, Set, console, out, settings_here
from sbtiny.errors import InputError


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
    return console().print(table)


@app.command(rich_help_panel=HELP)
def plan(
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    extra: Set = None,
    four_bit: FourBit = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this device for 5 seconds and add hours.")] = False,
    as_json: AsJson = False,
) -> None:
    """Memory of every stage against what is free, part by part, before anything is loaded. Needs no network.

    Example: sbtiny plan --model qwen-1.5b --preset rtx4090
    """
    from sbtiny.models.device import glance
    from sbtiny.planning.memory_plan import plan as planned
    from sbtiny.models.shapes import shape_of
    from sbtiny.planning.workload import STAGES

    seen = glance()
    settings, preset, _ = settings_here(config, preset, extra, model=model, four_bit=four_bit)
    shape = shape_of(settings.model)
    plans = [planned(stage, settings, shape, seen, preset) for stage in STAGES]
    found = {p.stage: p.record() for p in plans}
    if probe and not plans[0].here:
        other = plans[0].device
        raise InputError(f"--probe measures what is here, {seen.name}, and the plan is for {other}: leave --probe out, or run it there")
    if probe:
        from sbtiny.planning.probe import hours, measure

        speed = measure(shape)
        found = {p.stage: found[p.stage] | {"hours_at_least": round(hours(p, shape, speed), 3)} for p in plans}
    if as_json:
        out({"model": settings.model, "shape": asdict(shape), "stages": found}, True)
    else:
        console().print(plan_table(settings.model, found))


def plan_table(model: str, found: dict[str, dict[str, Any]]) -> Any:
    """Stages side by side: GiB by part, then what they add up to."""
    from rich.table import Table

    first = next(iter(found.values()))
    where = f"{first['device']}{'' if first['here'] else ' (not this machine)'}, {first['dtype']}"
    table = Table(
        "GiB", *found, box=None, header_style="bold", title=f"{model} on {where}{', 4-bit' if first['four_bit'] else ''}"
    )
    for part in first["parts"]:
        table.add_row(part.replace("_", " "), *(f"{f['parts'][part]:.2f}" for f in found.values()))
    table.add_section()
    for key in ("peak_gb", "free_gb", "fits", "slots", "micro_batch", "gradient_accumulation", "largest_micro_batch", "hours_at_least"):
        if key in first:
            table.add_row(key.replace("_gb", "").replace("_", " "), *(str(f[key]) for f in found.values()))
    for key in first["tokens_at_most"]:
        table.add_row(f"tokens {key}, at most", *(f"{f['tokens_at_most'][key]:,}" for f in found.values()))
    return table


@app.command(rich_help_panel=HELP)
def doctor(as_json: AsJson = False) -> None:
    """Versions against the tested set, the device, extras, disk: what is here and what to do about the rest.

    Example: sbtiny doctor --json
    """
    from rich.markup import escape

    from sbtiny.cli.doctor import examine, record

    findings = examine()
    found = record(findings)
    if as_json:
        out(found, True)
    else:
        colours = {"ok": "green", "note": "yellow", "bad": "red"}
        screen = console(highlight=False, soft_wrap=True)
        for f in findings:
            mend = f"  -> {f.mend}" if f.mend else ""
            screen.print(f"[{colours[f.state]}]{f.state:5}[/]{f.section:10}{f.name:16}{escape(f.found + mend)}")
    raise typer.Exit(0 if found["ok"] else 1)
