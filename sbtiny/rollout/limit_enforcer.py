"""What control says, done to the tokens of one slot."""

from collections import deque
from collections.abc import Sequence

from sbtiny.rollout.limits import Control, Limits, Verdict
from sbtiny.rollout.episode import Episode, Request, StopReason, read_episode


class Guard:
    """Stands between the sampler and an answer that has limits or may be interrupted; `injected` has a mark a token."""

    def __init__(self, request: Request, pieces: Sequence[str]) -> None:
        self.control = Control(request.limits or Limits(), request.prefill)
        self.interrupt, self.pieces = request.interrupt, pieces
        self.forced: deque[int] = deque()
        self.injected: list[bool] = []

    def take(self, token: int, stop: bool) -> int | StopReason:
        """The token that stands where this one was sampled, or why the answer ends without it. `stop`: it is a stop token."""
        if self.interrupt is not None and self.interrupt.is_set():
            return "interrupted"
        if not self.forced and not stop:
            verdict = self.control.see(self.pieces[token])
            if verdict is Verdict.STOP:
                return "ceiling"
            if verdict is Verdict.WRAP_UP:
                self.forced.extend(self.control.limits.wrap_up)
        self.injected.append(bool(self.forced))
        if self.forced:
            token = self.forced.popleft()
            self.control.see(self.pieces[token], forced=True)
        return token


def finished(
    request: Request,
    ids: list[int],
    pieces: Sequence[str],
    reason: StopReason,
    logprobs: list[float] | None = None,
    guard: Guard | None = None,
) -> Episode:
    """The episode of an answer that ended; of a guarded one, what was injected is marked, and a wrap-up is the reason it ended."""
    ended = reason == "end"
    if guard is None:
        return read_episode(request, ids, pieces, reason, logprobs)
    if guard.control.wrapped and reason != "interrupted":
        reason = "ceiling"
    injected = guard.injected[: len(ids)]
    if logprobs:
        logprobs = [0.0 if forced else value for value, forced in zip(logprobs, injected, strict=True)]
    episode = read_episode(request, ids, pieces, reason, logprobs, injected, ended)
    episode.heeded = guard.control.budget
    return episode
