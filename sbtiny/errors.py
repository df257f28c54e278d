"""The errors that the CLI prints in one line."""


class InputError(Exception):
    """Wrong input: one line that says what, where, and how to fix it. The CLI prints it and exits with code 2."""


class Failed(Exception):
    """The work failed (nothing learnable, a collapse): one line, exit code 1."""
