"""The verbs of the command line. They import heavy modules when they run, so that --help is fast."""

# isort: off
from sbtiny.cli import train, data, evaluate, chat, export, bench, info  # noqa: F401  (this is the order of the help)
from sbtiny.cli.app import app, main

__all__ = ["app", "main"]
