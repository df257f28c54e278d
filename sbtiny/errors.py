"""The one error that is the user's to mend."""


class InputError(Exception):
    """Wrong input: one line that says what, where, and how to mend it. The CLI prints it and exits with code 2."""


class Failed(Exception):
    """The work itself did not succeed (nothing learnable, a collapse): one line, exit code 1."""
