"""Stop texts of a request: the answer ends before the first of them, and no beginning of one is ever sent."""

from collections.abc import Sequence

from sbtiny.budget.protocol import tag_prefix_length


class StopText:
    """Passes text on up to the first stop text; `is_hit` once that came."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.is_hit = tuple(stops), "", False

    def feed(self, text: str) -> str:
        """Add the next text. Returns what can be sent: what may begin a stop text is held back."""
        if self.is_hit or not self.stops:
            return "" if self.is_hit else text
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        kept = len(self.held) - max(tag_prefix_length(self.held, stop) for stop in self.stops)
        at = min(found, default=kept)
        passed, self.held, self.is_hit = self.held[:at], self.held[at:], bool(found)
        return passed

    def close(self) -> str:
        """Return what was held back at the end of the answer."""
        held, self.held = self.held, ""
        return "" if self.is_hit else held
