"""The typer application and the options of all verbs."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sbtiny import __version__


class Verbs(TyperGroup):
    """List the verbs by panel, in plain text: importing rich's boxes takes as long as all other imports."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = command.rich_help_panel if isinstance(command.rich_help_panel, str) else "Commands"
            panels.setdefault(panel, []).append((name, command.get_short_help_str(200)))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Verbs,
    name="sbtiny",
    help="Fine-tune a small reasoning model so that it says how long it will think, keeps its word, and thinks far less.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def version(wanted: bool) -> None:
    if wanted:
        print(f"sbtiny {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of all verbs."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import, which already logs
