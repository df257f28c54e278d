"""sbtiny: small reasoning models that say how long they will think, and keep their word."""

__version__ = "0.1.0"
