"""The decode loop's input, a request and how it is sampled, and its output, an episode. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sbtiny.budget.protocol import BUDGET_CLOSE, Parsed, body_length, parse
from sbtiny.errors import InputError
from sbtiny.rollout.limit_enforcer import Interrupt, LimitEnforcer
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.token_pieces import join_pieces

StopReason = Literal["end", "ceiling", "interrupted", "length"]
BudgetSource = Literal["self", "user"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is below 0: use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not in (0, 1]: use 1 to switch it off")
        if self.top_k < 0 or not 0 <= self.min_p < 1:
            raise InputError(f"top_k {self.top_k} must be 0 or more and min_p {self.min_p} in [0, 1)")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample.

    `prompt_ids` is the whole context. `prefill` is the text at its end that already belongs to the answer
    (`<budget>50</budget><solution>`, `<budget>` or nothing). `max_tokens` limits the completion. `seed` alone fixes its randomness,
    whatever else is in the batch. `expected` is a guess of its length in tokens, used to start long ones early. `limits` may cut the
    body and wrap it up. `interrupt`, pressed from any thread, wraps the answer up at the next safe point, and ends it when pressed again.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    prefill: str = ""
    expected: int = 0
    limits: Limits | None = None
    interrupt: Interrupt | None = None

    @property
    def has_given_budget(self) -> bool:
        """Whether the prefill names a budget; it may open its tag alone."""
        return BUDGET_CLOSE in self.prefill

    @property
    def is_unlimited(self) -> bool:
        """Only a stop token or `max_tokens` can end it, so its tokens need no check."""
        return self.limits is None and self.interrupt is None

    def enforcer(self, pieces: Sequence[str]) -> LimitEnforcer | None:
        """The enforcer of its limits; None for an unlimited request."""
        return None if self.is_unlimited else LimitEnforcer(self.limits or Limits(), self.prefill, self.interrupt, pieces)


@dataclass(slots=True)
class Episode:
    """One sampled completion: its tokens, their text, and why they ended.

    `ended`: the model ended by itself, also after a wrap-up; `completion_ids` then holds the stop token. `length` counts the tokens of
    the solution body, with `<think>` those of thoughts and answer, and all tokens of a malformed completion. `injected` marks each token
    that was not sampled and must not be trained on. `logprobs` are 0 for injected tokens. `enforced_budget` is the budget that the
    limits went by; a budget after other words limits nothing.
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
    enforced_budget: int | None = None

    @property
    def predicted(self) -> int | None:
        """The stated budget, also of a malformed answer; None where the user gave one."""
        return None if self.request.has_given_budget else self.parsed.budget

    @property
    def allowed(self) -> int | None:
        """Body tokens before this answer is wrapped up; None without limit."""
        return self.request.limits.allowed(self.enforced_budget) if self.request.limits else None

    @property
    def budget(self) -> int | None:
        return self.parsed.budget if self.parsed.ok else None

    @property
    def source(self) -> BudgetSource:
        """Who set the budget."""
        return "user" if self.request.has_given_budget else "self"

    @property
    def solution(self) -> str:
        """The text to verify: the answer after `</think>`, else the body, else the whole text (of the initial model, say)."""
        candidates = (self.parsed.answer, self.parsed.body, self.text)
        return next(text for text in candidates if text is not None)


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

    `ended`: the last token is a stop token, which has no text (default: when the stop reason is "end").
    """
    ended = stop_reason == "end" if ended is None else ended
    ids = completion_ids[:-1] if ended else completion_ids
    text = request.prefill + join_pieces(ids, pieces)
    parsed = parse(text)
    length = count_body([request.prefill, *(pieces[i] for i in ids)], parsed, text) if parsed.ok else len(ids)
    injected = injected or [False] * len(completion_ids)
    return Episode(request, completion_ids, text, parsed, length, stop_reason, logprobs or [], injected, ended)


def count_body(words: list[str], parsed: Parsed, text: str) -> int:
    """Count the tokens of the body, by their own words: in `text` tokens that share a character have no bounds."""
    apart = "".join(words)
    return body_length(words, parsed if apart == text else parse(apart))


def to_episode(
    request: Request,
    ids: list[int],
    pieces: Sequence[str],
    reason: StopReason,
    logprobs: list[float] | None = None,
    enforcer: LimitEnforcer | None = None,
) -> Episode:
    """The episode of a finished answer. With an enforcer its injected tokens are marked, and the cause of a wrap-up is the stop reason."""
    ended = reason == "end"
    if enforcer is None:
        return read_episode(request, ids, pieces, reason, logprobs)
    if enforcer.cause and reason != "interrupted":
        reason = enforcer.cause
    injected = enforcer.injected[: len(ids)]
    if logprobs:
        logprobs = [0.0 if forced else value for value, forced in zip(logprobs, injected, strict=True)]
    episode = read_episode(request, ids, pieces, reason, logprobs, injected, ended)
    episode.enforced_budget = enforcer.tracker.budget
    return episode
