"""`python -m sbtiny`."""

from sbtiny.cli import main

main()
