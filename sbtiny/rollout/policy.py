"""A model with its tokenizer, ready to be asked: how a question becomes a request, with or without a budget set by the user."""

from collections.abc import Sequence
from threading import Event

from torch import nn
from transformers import PreTrainedTokenizerBase

from sbtiny.budget.protocol import SOLUTION, Format, prefill
from sbtiny.config import EngineName
from sbtiny.models.prompt import fit_template, inner_ids, prompt_ids, stop_ids
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.decoder import Decoder, OnEpisode
from sbtiny.rollout.engine import Engine, token_pieces
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.engines.generate import Generate
from sbtiny.rollout.sampling import Sampling
from sbtiny.rollout.engines.vllm import Vllm

ENGINES: dict[EngineName, type[Decoder]] = {"ours": Engine, "generate": Generate, "vllm": Vllm}


class Policy:
    """Samples answers of `model`; call `refresh` after its weights have changed. `form` is the format it was trained in."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        slots: int = 64,
        kv_memory: float | None = None,
        engine: EngineName = "ours",
        form: Format = SOLUTION,
    ) -> None:
        self.model, self.tokenizer, self.form = model, tokenizer, form
        fit_template(tokenizer, form)
        pieces = token_pieces(tokenizer, model.get_input_embeddings().weight.shape[0])
        self.engine: Decoder = ENGINES[engine](model, pieces, stop_ids(model, tokenizer), slots, kv_memory)

    def refresh(self) -> None:
        self.engine.refresh()

    def encode(self, text: str) -> list[int]:
        return inner_ids(self.tokenizer, text)

    def request(
        self,
        question: str,
        max_tokens: int,
        seed: int,
        budget: int | None = None,
        expected: int = 0,
        limits: Limits | None = None,
        interrupt: Event | None = None,
        system: str | None = None,
    ) -> Request:
        """A request for one answer; a `budget` is prefilled, so that the model finds it already written.

        The prefilled text is tokenised by itself, exactly as the cold start trains it.
        """
        said = "" if budget is None else prefill(budget, self.form)
        ids = (*prompt_ids(self.tokenizer, question, system), *self.encode(said))
        return Request(ids, max_tokens, seed, said, expected or budget or 0, limits, interrupt)

    def budget_request(self, question: str, seed: int, system: str | None = None) -> Request:
        """A request for the number alone: room for the tags of the largest common one and no more."""
        return self.request(question, len(self.encode(prefill(999_999, self.form))), seed, system=system)

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None
    ) -> list[Episode]:
        return self.engine.run(requests, sampling, on_episode)
