"""One unfinished answer, for engines that keep answers one by one; ours keeps them in arrays (`scheduler`)."""

from collections.abc import Sequence

import numpy as np

from sbtiny.rollout.episode import Episode, Request, StopReason, to_episode
from sbtiny.rollout.sampling import counter_uniforms


class RunningSequence:
    """The tokens written for one request, and the enforcer of its limits; `index` is its place in the list of requests."""

    def __init__(self, index: int, request: Request, pieces: Sequence[str]) -> None:
        self.index, self.request, self.pieces = index, request, pieces
        self.enforcer = request.enforcer(pieces)
        self.written: list[int] = []
        self.logprobs: list[float] = []

    def append(self, token: int, logprob: float, stops: np.ndarray) -> StopReason | None:
        """Write one sampled token, or the one its limits force. Returns the stop reason when the answer is over."""
        if self.enforcer:
            outcome = self.enforcer.check_token(token, bool(stops[token]))
            if isinstance(outcome, str):
                return outcome
            token = outcome
        self.written.append(token)
        self.logprobs.append(logprob)
        if stops[token]:
            return "end"
        return "length" if len(self.written) >= self.request.max_tokens else None

    def episode(self, reason: StopReason, with_logprobs: bool) -> Episode:
        logprobs = self.logprobs if with_logprobs else None
        return to_episode(self.request, self.written, self.pieces, reason, logprobs, self.enforcer)


def uniform_for(answers: Sequence[RunningSequence]) -> np.ndarray:
    """The uniform draws (answers,) that decide the next token of each answer."""
    seeds = np.array([a.request.seed % 2**64 for a in answers], dtype=np.uint64)
    return counter_uniforms(seeds, np.array([len(a.written) for a in answers], dtype=np.uint64))
