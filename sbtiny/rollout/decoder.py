"""The interface of every engine: requests in, episodes out, no type of the library below.

| engine     | decodes through                          | for                                                    |
|------------|------------------------------------------|--------------------------------------------------------|
| `ours`     | a folded copy of the weights (`engine`)  | Llama, Qwen2 and Qwen3 models                          |
| `generate` | the model's own `generate`               | any model of transformers, unsloth's too               |
| `vllm`     | vLLM (`vllm`)                            | answers without limits, where it is installed          |

A .gguf file is decoded by llama.cpp (`llama_cpp`) where it is installed.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sbtiny.errors import InputError
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.sampling import Sampling

OnEpisode = Callable[[int, Episode], None]


class DecodeEngine(Protocol):
    """`pieces[i]` is the text of token i of the vocabulary, `stops[i]` says whether it ends an answer."""

    pieces: Sequence[str]
    stops: np.ndarray

    def run(self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None) -> list[Episode]:
        """Sample every request; episodes come in their order. Calls `on_episode(index, episode)` as each one ends.

        Raises InputError, before any work, for an invalid request.
        """

    def refresh(self) -> None:
        """Use the model's present weights, with its adapter unless that is disabled."""

    def check_room(self, tokens: int) -> None:
        """Raise InputError when not even one sequence of `tokens` fits into memory; call it before long work."""


def stop_mask(stop_ids: frozenset[int], size: int) -> np.ndarray:
    """Mask (size,) of the stop tokens of a vocabulary. Raises InputError for a stop token outside it."""
    if outside := [i for i in stop_ids if not 0 <= i < size]:
        raise InputError(f"stop token {outside[0]} is outside the vocabulary of {size}: fix eos_token_id")
    stops = np.zeros(size, dtype=bool)
    stops[list(stop_ids)] = True
    return stops


def validate_requests(requests: Sequence[Request], positions: int | None, stops: np.ndarray) -> None:
    """Raise InputError for an empty prompt, a prompt too long for the model's positions, or an impossible wrap-up."""
    for request in requests:
        prompt = len(request.prompt_ids)
        if not prompt:
            raise InputError("an empty prompt: the chat template rendered nothing")
        if request.max_tokens < 1:
            raise InputError(f"a request for {request.max_tokens} tokens: ask for 1 or more")
        if positions is not None and prompt + request.max_tokens > positions:
            raise InputError(
                f"a prompt of {prompt} tokens and {request.max_tokens} to write exceed the model's {positions} positions: lower max_tokens"
            )
    for token in {token for r in requests if r.limits for token in r.limits.wrap_up}:
        if not 0 <= token < len(stops) or stops[token]:
            raise InputError(f"token {token} of the wrap-up text is a stop token or outside the vocabulary: reword it")
