"""sbtiny: small reasoning models that say how long they will think, and keep their word."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbtiny.serving.assistant import Assistant

__version__ = "0.1.0"


def load(model: str, **options: Any) -> "Assistant":
    """Load a run, a model or a .gguf file to ask it questions; see `sbtiny.serving.assistant.load`. Imports torch only now."""
    from sbtiny.serving import assistant

    return assistant.load(model, **options)
