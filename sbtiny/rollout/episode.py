"""What goes into the decode loop and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Literal

from sbtiny.budget.protocol import Parsed, body_length, parse
from sbtiny.rollout.limits import Limits, LimitSource

StopReason = Literal["end", "ceiling", "interrupted", "length"]
BudgetSource = Literal["self", "user"]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample.

    `prompt_ids` is the whole context, a prefilled budget included; `prefill` is the text of that part of it which already belongs to
    the answer (`<budget>50</budget><solution>` or nothing). `max_tokens` limits the completion; `seed` fixes its randomness whatever
    else is in the batch; `expected` is a guess of its length in tokens, used only to start long ones early. `limits` may cut the body
    and wrap it up; setting `interrupt`, from any thread, ends the answer between two tokens.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    prefill: str = ""
    expected: int = 0
    limits: Limits | None = None
    interrupt: Event | None = None

    @property
    def plain(self) -> bool:
        """Nothing but a stop token or `max_tokens` can end it: no need to look at its tokens one at a time."""
        return self.limits is None and self.interrupt is None


@dataclass(slots=True)
class Episode:
    """One sampled completion: tokens, what they say, and why they ended.

    `completion_ids` holds the stop token when the model ended by itself (`ended`), after a wrap-up too. `length` counts the tokens of
    the solution body, of thoughts and answer with `<think>`; a malformed completion counts as a whole. `injected` marks, token by token,
    those that were not sampled: they must not be trained on. `logprobs` are those of sampled tokens, 0 for injected ones. `heeded` is
    the number control went by: a number behind other words limits nothing.
    """

    request: Request
    completion_ids: list[int]
    text: str
    parsed: Parsed
    length: int
    stop_reason: StopReason
    logprobs: list[float] = field(default_factory=list)
    injected: list[bool] = field(default_factory=list)
    ended: bool = True
    heeded: int | None = None

    @property
    def predicted(self) -> int | None:
        """The number the model said itself, whatever became of the rest."""
        return None if self.request.prefill else self.parsed.budget

    @property
    def allowed(self) -> int | None:
        """Body tokens this answer might take before it would be wrapped up; None without limit."""
        return self.request.limits.allowed(self.heeded) if self.request.limits else None

    @property
    def limited_by(self) -> LimitSource | None:
        """Whose limit `allowed` is."""
        return self.request.limits.source(self.heeded, bool(self.request.prefill)) if self.request.limits else None

    @property
    def budget(self) -> int | None:
        return self.parsed.budget if self.parsed.ok else None

    @property
    def source(self) -> BudgetSource:
        """Who set the number."""
        return "user" if self.request.prefill else "self"

    @property
    def solution(self) -> str:
        """The text to verify: the answer behind `</think>`, else the body, or everything when there is none (the base model)."""
        read = (self.parsed.answer, self.parsed.body, self.text)
        return next(text for text in read if text is not None)


def read_episode(
    request: Request,
    completion_ids: list[int],
    pieces: Sequence[str],
    stop_reason: StopReason,
    logprobs: list[float] | None = None,
    injected: list[bool] | None = None,
    ended: bool | None = None,
) -> Episode:
    """Read a finished completion; `pieces[i]` is the text of token i of the vocabulary.

    `ended`: the last token is a stop token, which is no text at all (default: when the stop reason is "end").
    """
    ended = stop_reason == "end" if ended is None else ended
    words = [pieces[i] for i in completion_ids]
    if ended:
        words = words[:-1]
    text = request.prefill + "".join(words)
    parsed = parse(text)
    length = body_length([request.prefill, *words], parsed) if parsed.ok else len(words)
    injected = injected or [False] * len(completion_ids)
    return Episode(request, completion_ids, text, parsed, length, stop_reason, logprobs or [], injected, ended)
