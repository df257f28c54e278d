"""The verbs, one file a kind of work. Everything heavy is imported inside them, so that help answers at once."""

# isort: off
from sbtiny.cli import train, data, evaluate, export, bench, info  # noqa: F401  (this is the order of the help)
from sbtiny.cli.app import app, main

__all__ = ["app", "main"]
