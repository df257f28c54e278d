"""The interface of every engine: requests in, episodes out, no type of the library below.

| engine     | decodes through                          | for                                                    |
|------------|------------------------------------------|--------------------------------------------------------|
| `ours`     | a folded copy of the weights (`engine`)  | Llama, Qwen2 and Qwen3 models                          |
| `generate` | the model's own `generate`               | any model of transformers, unsloth's too               |
| `vllm`     | vLLM, stepped under our limits (`vllm`)  | whatever vLLM runs, where it is installed              |

A .gguf file is decoded by llama.cpp (`llama_cpp`) where it is installed. With `--upstream` servers elsewhere decode (`upstream`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from sbtiny.budget.remaining import Foretell, estimate_remaining
from sbtiny.errors import InputError
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.rollout.session import Session, Ticket

OnEpisode = Callable[[int, Episode], None]


class DecodeEngine(ABC):
    """`pieces[i]` is the text of token i of the vocabulary, `stops[i]` says whether it ends an answer.

    `max_positions` is the longest sequence of the model; None is no limit. `servers` says what decodes elsewhere, none where this process
    does, and `fingerprint` what is known of the weights there. Answers are shared out among them by `foretell`.
    """

    pieces: Sequence[str]
    stops: np.ndarray
    max_positions: int | None
    servers: Sequence[str] = ()
    fingerprint: str | None = None
    foretell: Foretell = staticmethod(estimate_remaining)

    @abstractmethod
    def open_session(self, capacity: int, kept_prefixes: int = 0) -> Session:
        """Open a session for sequences of at most `capacity` tokens, prompt included. It ends the engine's earlier session.

        The keys and values of the last `kept_prefixes` answers are kept, so that a prompt that goes on from one is not computed again. Of
        the memory a share is left for them and for held answers, which `Session.spare_bytes` says.
        """

    def slot_bytes(self, capacity: int) -> int:
        """Bytes of the keys and values of one sequence of `capacity` tokens; of engines that hold answers."""
        raise NotImplementedError

    @abstractmethod
    def refresh(self) -> None:
        """Use the model's present weights, with its adapter unless that is disabled."""

    @abstractmethod
    def check_room(self, tokens: int) -> None:
        """Raise InputError when not even one sequence of `tokens` fits into memory; call it before long work."""

    def make_ticket(self, request: Request, sampling: Sampling) -> Ticket:
        """The ticket of a valid request. Raises InputError for an invalid one."""
        validate_request(request, self.max_positions, self.stops)
        return Ticket(request, sampling, self.pieces)

    def run(self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None) -> list[Episode]:
        """Sample every request, long ones first so that the end is short; episodes come in the order of the requests.

        Calls `on_episode(index, episode)` as each one ends. Raises InputError, before any work, for an invalid request; UpstreamError
        where a server fails.
        """
        if not requests:
            return []
        for request in requests:
            self.make_ticket(request, sampling)  # raises before the memory is reserved
        session = self.open_session(max(len(r.prompt_ids) + r.max_tokens for r in requests))
        order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)
        places = {session.add(requests[i], sampling): i for i in order}
        episodes: dict[int, Episode] = {}
        while session.is_busy:
            for ticket in session.step():
                if ticket.refusal is not None:
                    raise ticket.refusal
                i = places[ticket]
                episodes[i] = ticket.episode
                if on_episode:
                    on_episode(i, episodes[i])
        return [episodes[i] for i in range(len(requests))]


def stop_mask(stop_ids: frozenset[int], size: int) -> np.ndarray:
    """Mask (size,) of the stop tokens of a vocabulary. Raises InputError for a stop token outside it."""
    if outside := [i for i in stop_ids if not 0 <= i < size]:
        raise InputError(f"stop token {outside[0]} is outside the vocabulary of {size}: fix eos_token_id")
    stops = np.zeros(size, dtype=bool)
    stops[list(stop_ids)] = True
    return stops


def validate_request(request: Request, positions: int | None, stops: np.ndarray) -> None:
    """Raise InputError for an empty prompt, a prompt too long for the model's positions, or an impossible wrap-up."""
    prompt = len(request.prompt_ids)
    if not prompt:
        raise InputError("an empty prompt: the chat template rendered nothing")
    if request.max_tokens < 1:
        raise InputError(f"a request for {request.max_tokens} tokens: ask for 1 or more")
    if positions is not None and prompt + request.max_tokens > positions:
        raise InputError(
            f"a prompt of {prompt} tokens and {request.max_tokens} to write exceed the model's {positions} positions: lower max_tokens"
        )
    for token in (*request.limits.wrap_up, *request.limits.thoughts_wrap_up) if request.limits else ():
        if not 0 <= token < len(stops) or stops[token]:
            raise InputError(f"token {token} of the wrap-up text is a stop token or outside the vocabulary: reword it")
