"""The errors that the CLI prints in one line."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Wrong input: one line that says what, where, and how to fix it. The CLI prints it and exits with code 2."""


class UpstreamError(InputError):
    """A server that decodes for us has failed. `is_refusal`: it is there and does not take the request, nor would another."""

    def __init__(self, message: str, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


class Failed(Exception):
    """The work failed (nothing learnable, a collapse): one line, exit code 1."""


def run_script(main: Callable[[], None]) -> None:
    """Run the `main` of a script beside the CLI: wrong input is one line on stderr and exit code 2 there too."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
