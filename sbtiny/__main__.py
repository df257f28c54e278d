"""`python -m sbtiny`."""

from sbtiny.cli.main import main

main()
