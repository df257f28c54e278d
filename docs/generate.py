"""Write cli.md and settings.md from the command line and the settings themselves, so that they cannot drift.

python docs/generate.py [FOLDER]        (default: docs/; `make docs` runs it)
"""

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from sbtiny import config
from sbtiny.cli import main as cli
from sbtiny.load_settings import PRESETS, TYPES, load_settings
from sbtiny.runs import write_text

NOTE = "<!-- Written by docs/generate.py: change the code it reads, then run `make docs`. -->"
EXAMPLE = re.compile(r"\n*Example: (.+)$", re.DOTALL)
CLI_INTRO = (
    "Exit codes: 0 done, 1 failed, 2 wrong input (one line says what, where and how to fix it), 130 interrupted,\n"
    "141 output that nobody reads any more; of `chat` 143 and 129 at SIGTERM and hang-up.\n"
    "`RUN` is a run folder or its name under `runs/`. Keys for `--set` and `-c` are in [settings.md](settings.md)."
)
SETTINGS_INTRO = (
    "Flags win over the file (`-c mine.yaml`), the file over the preset (`--preset`), the preset over the defaults. In a file the part\n"
    "before the dot is a section; on the command line write `--set grpo.learning_rate=3e-4`. `--dry-run` prints those of a stage.\n\n"
    "A preset's column is empty where it keeps the default. 'paper' marks the paper's value."
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- cli.md ----------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    root = typer.main.get_command(cli.app)
    parts = [NOTE, "# Commands", root.help, CLI_INTRO, options("sbtiny", root)]
    panel = None
    for name, command in verbs("sbtiny", root):
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            parts.append(f"## {panel}")
        parts += [f"### {name}", *description(command), options(name, command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verbs(prefix: str, group: TyperGroup) -> Iterator[tuple[str, TyperCommand]]:
    """(`sbtiny data build`, command) of every verb, panel by panel; the verbs of a group stand in the group's panel."""
    commands = list(leaves(prefix, group))
    for panel in dict.fromkeys(command.rich_help_panel for _, command in commands):
        yield from ((name, command) for name, command in commands if command.rich_help_panel == panel)


def leaves(prefix: str, group: TyperGroup) -> Iterator[tuple[str, TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            for full_name, inner in leaves(f"{prefix} {name}", command):
                inner.rich_help_panel = inner.rich_help_panel or command.rich_help_panel
                yield full_name, inner
        else:
            yield f"{prefix} {name}", command


def description(command: TyperCommand) -> list[str]:
    """The verb's help text, and its example as a code block."""
    text = inspect.cleandoc(command.help or "")
    example = EXAMPLE.search(text)
    return [EXAMPLE.sub("", text), *([f"    {example[1].strip()}"] if example else [])]


def options(name: str, command: TyperCommand) -> str:
    """A table of the verb's arguments and options, without --help."""
    context = typer.Context(command, info_name=name)
    rows = []
    for param in command.params:
        if param.name != "help" and (record := param.get_help_record(context)):
            label = (param.metavar or param.name.upper()) if param.param_type_name == "argument" else record[0]
            rows.append((f"`{label}`", " ".join(record[1].split())))
    return table(("option", "meaning"), rows) if rows else ""


# ---- settings.md -----------------------------------------------------------------------------------------------------


def settings_page() -> str:
    settings = {"default": config.Settings()} | {preset: load_settings(preset=preset) for preset in PRESETS}
    parts = [NOTE, "# Settings", SETTINGS_INTRO, *section(config.Settings, "", settings)]
    for name, kind in get_type_hints(config.Settings).items():
        if is_dataclass(kind):
            parts += [f"## {name}", *section(kind, f"{name}.", settings)]
    return "\n\n".join(parts) + "\n"


def section(kind: type, prefix: str, settings: dict[str, config.Settings]) -> list[str]:
    """The docstring of a settings class, and a table of its keys without sections."""
    hints, meanings = get_type_hints(kind), comments(kind)
    rows = []
    for name in (item.name for item in fields(kind) if not is_dataclass(hints[item.name])):
        default, *presets = (attrgetter(prefix + name)(each) for each in settings.values())
        values = [format_value(default), *("" if value == default else format_value(value) for value in presets)]
        rows.append([f"`{prefix}{name}`", type_name(hints[name]), *values, meanings.get(name, "")])
    return [inspect.cleandoc(kind.__doc__), table(("key", "type", *settings, "meaning"), rows)]


def comments(kind: type) -> dict[str, str]:
    """Field name -> the comment on its line."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.MULTILINE))


def type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(hint))
    return " or ".join(TYPES[option].removeprefix("a ") for option in get_args(hint) or (hint,))


def format_value(value: Any) -> str:
    """A value as YAML writes it; text is quoted only if it does not fit on one line."""
    return f"`{value}`" if isinstance(value, str) and value.isprintable() else f"`{json.dumps(value)}`"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    write_text(folder / "cli.md", cli_page())
    write_text(folder / "settings.md", settings_page())


if __name__ == "__main__":
    main()
