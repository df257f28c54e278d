"""The verbs, one file a kind of work. Everything heavy is imported inside them, so that help answers at once."""

from sbtiny.cli import training, data, measuring, delivering, benching, looking  # noqa: F401, I001  (this is the order of the help)
from sbtiny.cli.app import app, main

__all__ = ["app", "main"]
