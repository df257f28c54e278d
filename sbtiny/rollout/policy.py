"""A model with its tokenizer and engine: turns questions into requests, with or without a given budget, and samples answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedTokenizerBase

from sbtiny.budget.protocol import BUDGET_OPEN, Format, render_budget
from sbtiny.config import PromptSettings
from sbtiny.models.chat_template import split_prompt
from sbtiny.models.prompt import Message, continuation_ids, prompt_ids
from sbtiny.rollout.decode_engine import DecodeEngine, OnEpisode
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.limits import Limits


class Policy:
    """Samples answers through `engine`. Call `refresh` after the weights of `model` have changed; a .gguf file has no model.

    `form` is the format it was trained in; the tokenizer's chat template must be fitted to it (`fit_template`). `states_budget`: it was
    trained to state one; a plain model was not, and its prompts end with `opening`, which the fitting took off.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        tokenizer: PreTrainedTokenizerBase,
        form: Format,
        model: nn.Module | None = None,
        states_budget: bool = True,
        opening: str = "",
    ) -> None:
        self.engine, self.tokenizer, self.form, self.model, self.states_budget = engine, tokenizer, form, model, states_budget
        self.opening = opening

    @property
    def asked_with(self) -> PromptSettings:
        """The instruction and the system turn of every question, None for none."""
        return split_prompt(self.tokenizer.chat_template)[0]

    def refresh(self) -> None:
        self.engine.refresh()

    def encode(self, text: str) -> list[int]:
        return continuation_ids(self.tokenizer, text)

    def prompt(self, question: str | Sequence[Message], system: str | None = None, opens: bool = True) -> list[int]:
        """Token ids of a question, or of the turns of a chat, up to the answer. Raises InputError as `prompt_ids` does.

        `opens`: what a plain model's own template opens is opened; not where a budget follows, which comes before it.
        """
        ids = prompt_ids(self.tokenizer, question, system)
        return [*ids, *self.encode(self.opening)] if opens and self.opening and not self.states_budget else ids

    @contextmanager
    def initial_model(self) -> Iterator[None]:
        """Ask the model without its adapter, as it was before: it states no budget, and its template opens what it opened."""
        states_budget = self.states_budget
        try:
            with self.model.disable_adapter():
                self.states_budget = False
                self.refresh()
                yield
        finally:
            self.states_budget = states_budget
            self.refresh()

    def request(
        self,
        question: str | Sequence[Message] | Sequence[int],
        max_tokens: int,
        seed: int,
        budget: int | None = None,
        expected: int = 0,
        limits: Limits | None = None,
        interrupt: Interrupt | None = None,
        system: str | None = None,
        opens_budget: bool = False,
    ) -> Request:
        """A request for one answer to a question, to the turns of a chat, or to a prompt's token ids. A given `budget` is prefilled.

        The prefilled text is tokenised by itself, exactly as the cold start trains it. `opens_budget` prefills `<budget>` where none is
        given: training has single turns, and in a later one a model may forget to state its budget.
        """
        opening = BUDGET_OPEN if opens_budget else ""
        prefill = opening if budget is None else render_budget(budget, self.form)
        is_prompt = not isinstance(question, str) and all(isinstance(item, int) for item in question)
        ids = question if is_prompt else self.prompt(question, system, opens=not prefill)
        return Request((*ids, *self.encode(prefill)), max_tokens, seed, prefill, expected or budget or 0, limits, interrupt)

    def cut_limits(self, ceiling: int, wrap_up: str | None = None, reserve: int | None = None) -> Limits:
        """The limits of an answer that is cut after `ceiling` tokens. None: the format's own wrap-up, the format's own reserve."""
        text = self.form.wrap_up if wrap_up is None else wrap_up
        return Limits(ceiling, None, tuple(self.encode(text)), reserve or self.form.reserve)

    def budget_request(
        self, question: str | Sequence[Message] | Sequence[int], seed: int, system: str | None = None, opens_budget: bool = False
    ) -> Request:
        """A request for the stated budget alone: `max_tokens` holds a budget of six digits and no more."""
        return self.request(question, len(self.encode(render_budget(999_999, self.form))), seed, system=system, opens_budget=opens_budget)

    def sample(self, requests: Sequence[Request], sampling: Sampling, on_episode: OnEpisode | None = None) -> list[Episode]:
        return self.engine.run(requests, sampling, on_episode)
