"""Verbs that look around: models."""

from rich.console import Console

from sbtiny.cli.app import app
from sbtiny.cli.options import HELP, AsJson, out


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
