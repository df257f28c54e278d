"""One answer under way, for engines that keep theirs one by one; ours keeps its in arrays (`batch`)."""

from collections.abc import Sequence

import numpy as np

from sbtiny.rollout.episode import Episode, Request, StopReason
from sbtiny.rollout.limit_enforcer import Guard, finished
from sbtiny.rollout.sampling import uniforms


class Answer:
    """What has been written to one request, and what stands guard over it; `index` is the request's place."""

    def __init__(self, index: int, request: Request, pieces: Sequence[str]) -> None:
        self.index, self.request, self.pieces = index, request, pieces
        self.guard = None if request.plain else Guard(request, pieces)
        self.written: list[int] = []
        self.logprobs: list[float] = []

    def take(self, token: int, logprob: float, stops: np.ndarray) -> StopReason | None:
        """Write one sampled token, or what control puts in its place; the reason when the answer is over."""
        if self.guard:
            answer = self.guard.take(token, bool(stops[token]))
            if isinstance(answer, str):
                return answer
            token = answer
        self.written.append(token)
        self.logprobs.append(logprob)
        if stops[token]:
            return "end"
        return "length" if len(self.written) >= self.request.max_tokens else None

    def episode(self, reason: StopReason, with_logprobs: bool) -> Episode:
        logprobs = self.logprobs if with_logprobs else None
        return finished(self.request, self.written, self.pieces, reason, logprobs, self.guard)


def draws(answers: Sequence[Answer]) -> np.ndarray:
    """The uniform number that decides each one's next token."""
    seeds = np.array([a.request.seed % 2**64 for a in answers], dtype=np.uint64)
    return uniforms(seeds, np.array([len(a.written) for a in answers], dtype=np.uint64))
