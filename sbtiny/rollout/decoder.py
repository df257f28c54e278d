"""What every engine is to its callers: requests in, episodes out; no type of the library behind it shows.

| engine     | decodes through                          | for                                                    |
|------------|------------------------------------------|--------------------------------------------------------|
| `ours`     | a folded copy of the weights (`engine`)  | Llama, Qwen2 and Qwen3 models                          |
| `generate` | the model's own `generate`               | whatever transformers can run, unsloth's models too    |
| `vllm`     | vLLM (`vllm`)                            | answers without limits, where it is installed          |

A .gguf file is decoded by llama.cpp (`llama_cpp`) where that is installed.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sbtiny.errors import InputError
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.sampling import Sampling

OnEpisode = Callable[[int, Episode], None]


class Decoder(Protocol):
    """`pieces[i]` is the text of token i of the vocabulary, `stops[i]` says whether it ends an answer."""

    pieces: Sequence[str]
    stops: np.ndarray

    def run(
        self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None
    ) -> list[Episode]:
        """Sample every request; the answer keeps their order. `on_episode(index, episode)` is called as each one ends.

        Raises InputError, before any work, for a request that cannot be answered.
        """

    def refresh(self) -> None:
        """Take the model's present weights, its adapter where it is not disabled."""

    def check_room(self, tokens: int) -> None:
        """Raise InputError when not one answer of so many tokens fits into memory: for callers with something to lose."""


def stop_mask(stop_ids: frozenset[int], size: int) -> np.ndarray:
    """`stops` of a vocabulary of `size` tokens. Raises InputError for a stop token outside it."""
    if outside := [i for i in stop_ids if not 0 <= i < size]:
        raise InputError(f"stop token {outside[0]} is outside the vocabulary of {size}: fix eos_token_id")
    stops = np.zeros(size, dtype=bool)
    stops[list(stop_ids)] = True
    return stops


def check(requests: Sequence[Request], positions: int | None, stops: np.ndarray) -> None:
    """Raise InputError for an empty prompt, one that leaves no room within the model's positions, an impossible wrap-up."""
    for request in requests:
        prompt = len(request.prompt_ids)
        if not prompt:
            raise InputError("an empty prompt: the chat template rendered nothing")
        if request.max_tokens < 1:
            raise InputError(f"a request for {request.max_tokens} tokens: ask for 1 or more")
        if positions is not None and prompt + request.max_tokens > positions:
            raise InputError(
                f"a prompt of {prompt} tokens and {request.max_tokens} to write exceed the model's {positions} positions: "
                "lower max_tokens"
            )
    for token in {token for r in requests if r.limits for token in r.limits.wrap_up}:
        if not 0 <= token < len(stops) or stops[token]:
            raise InputError(f"token {token} of the wrap-up text is a stop token or outside the vocabulary: reword it")
