"""What goes into the decode loop and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sbtiny.budget.protocol import Parsed, body_length, parse

StopReason = Literal["end", "ceiling", "interrupted", "length"]
BudgetSource = Literal["self", "user"]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample.

    `prompt_ids` is the whole context, a prefilled budget included; `prefill` is the text of that part of it which already belongs to
    the answer (`<budget>50</budget><solution>` or nothing). `max_tokens` limits the completion; `seed` fixes its randomness whatever
    else is in the batch; `expected` is a guess of its length in tokens, used only to start long ones early.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    prefill: str = ""
    expected: int = 0


@dataclass(slots=True)
class Episode:
    """One sampled completion: tokens, what they say, and why they ended.

    `completion_ids` holds the stop token when the model ended by itself. `length` counts the tokens of the solution body; a malformed
    completion counts as a whole.
    """

    request: Request
    completion_ids: list[int]
    text: str
    parsed: Parsed
    length: int
    stop_reason: StopReason
    logprobs: list[float] = field(default_factory=list)

    @property
    def budget(self) -> int | None:
        return self.parsed.budget if self.parsed.ok else None

    @property
    def source(self) -> BudgetSource:
        return "user" if self.request.prefill else "self"

    @property
    def solution(self) -> str:
        """The text to verify: the solution body, or everything when there is none (the base model writes no tags)."""
        return self.parsed.body if self.parsed.body is not None else self.text


def read_episode(
    request: Request,
    completion_ids: list[int],
    pieces: Sequence[str],
    stop_reason: StopReason,
    logprobs: list[float] | None = None,
) -> Episode:
    """Read a finished completion; `pieces[i]` is the text of token i of the vocabulary, a stop token being no text at all."""
    words = [pieces[i] for i in completion_ids]
    if stop_reason == "end":
        words = words[:-1]
    text = request.prefill + "".join(words)
    parsed = parse(text)
    length = body_length([request.prefill, *words], parsed) if parsed.ok else len(words)
    return Episode(request, completion_ids, text, parsed, length, stop_reason, logprobs or [])
