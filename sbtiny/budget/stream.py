"""The text of an unfinished answer, split into thoughts and answer as it comes. Pure text; no half tag is ever passed on."""

from dataclasses import dataclass
from typing import Literal

from sbtiny.budget.protocol import FORMATS, THINK, Format, Outcome, parse, tag_prefix_length

PartKind = Literal["thoughts", "answer"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of complete text. The body of `<solution>` is answer; that of `<think>` is thoughts, and the answer follows it."""

    kind: PartKind
    text: str


class AnswerSplitter:
    """Splits the text of one answer. `prefill` is the text that stands before it and belongs to it.

    `budget` is the stated or prefilled budget once its tag is closed. Without a legal head all text is answer, but a leading `<think>`
    opens thoughts.
    """

    def __init__(self, prefill: str = "") -> None:
        self.budget: int | None = None
        self.form: Format | None = None  # known when the body has begun
        self.held = prefill  # text not yet passed on
        self.section: Literal["head", "body", "after"] = "head"
        self.at_start = True  # of thoughts or answer, where white space is left out

    def feed(self, text: str) -> list[Part]:
        """Add the next text. Returns the parts that are complete."""
        self.held += text
        parts: list[Part] = []
        if self.section == "head":
            self._read_head()
        if self.section == "body":
            parts += self._read_body()
        if self.section == "after" and (self.held.strip() or self.form is None or self.form.answered):  # after </solution> comes nothing
            parts += self._pass_on(self.held, "answer")
            self.held = ""
        return parts

    def close(self) -> list[Part]:
        """The parts that are left at the end of the answer, without the beginning of a tag."""
        if self.section == "body":
            return self._pass_on(self.held[: len(self.held) - tag_prefix_length(self.held, self.form.closing)], self.kind)
        is_text = self.section == "head" and parse(self.held).outcome is not Outcome.CUT
        return self._pass_on(self.held, "answer") if is_text else []

    @property
    def kind(self) -> PartKind:
        """What the text that comes now is."""
        return "thoughts" if self.section == "body" and self.form.answered else "answer"

    def _read_head(self) -> None:
        opened = [(self.held.find(f.opening), f) for f in FORMATS.values() if f.opening in self.held]
        at, form = min(opened, key=lambda found: found[0], default=(len(self.held), None))
        parsed = parse(self.held[: at + len(form.opening)] if form else self.held)
        self.budget = parsed.budget
        is_open = parsed.outcome in (Outcome.CUT, Outcome.EMPTY)
        thinks = self.held.lstrip()
        if (form and is_open) or thinks.startswith(THINK.opening):
            self.section, self.form = "body", form
            self.held = self.held[at + len(form.opening) :]
        elif not is_open and not THINK.opening.startswith(thinks):
            self.section, self.budget = "after", None

    def _read_body(self) -> list[Part]:
        body, closed, rest = self.held.partition(self.form.closing)
        kept = 0 if closed else tag_prefix_length(body, self.form.closing)
        parts = self._pass_on(body[: len(body) - kept], self.kind)
        self.held = body[len(body) - kept :]
        if closed:
            self.section, self.held, self.at_start = "after", rest, self.at_start or self.form.answered
        return parts

    def _pass_on(self, text: str, kind: PartKind) -> list[Part]:
        text = text.lstrip() if self.at_start else text
        self.at_start = self.at_start and not text
        return [Part(kind, text)] if text else []
