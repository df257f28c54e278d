"""Chat with a GGUF file as users of llama.cpp do: with its template, tokenizer, sampler and stops, not our engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtiny.config import EvalSettings
from sbtiny.models import chat_template
from sbtiny.models.prompt import to_messages

CONTEXT = 4096  # tokens
SAMPLERS_OFF = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}  # llama-cpp-python's own defaults change the distribution


@dataclass(frozen=True, slots=True)
class Chat:
    """`text`: the answer, prefilled tags included. `ended`: by an end token, not by the limit."""

    text: str
    ended: bool


@contextmanager
def open_llama(file: Path) -> Iterator[Any]:
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, verbose=False)
    try:
        yield model
    finally:
        model.close()


def chat(
    model: Any, question: str, seed: int, e: EvalSettings, given: tuple[int | None, str] = (None, ""), system: str | None = None
) -> Chat:
    """One answer of an opened model. `given`: a budget for the chat template, and the text it becomes there."""
    budget, prefilled = given
    tokens = model.tokenize(render_prompt(model, question, budget, system).encode(), add_bos=False, special=True)
    room = max(1, min(e.max_tokens, model.n_ctx() - len(tokens)))
    completion = model.create_completion(tokens, max_tokens=room, seed=seed, temperature=e.temperature, top_p=e.top_p, **SAMPLERS_OFF)
    choice = completion["choices"][0]
    return Chat(prefilled + choice["text"], choice["finish_reason"] == "stop")


def render_prompt(model: Any, question: str, budget: int | None, system: str | None = None) -> str:
    """The prompt from the template in the file, with `budget` as in chat_template_kwargs."""
    ids = {"bos_token": model.token_bos(), "eos_token": model.token_eos()}
    special = {name: model.detokenize([i], special=True).decode() if i >= 0 else "" for name, i in ids.items()}
    how = special | ({} if budget is None else {"budget": budget})
    return chat_template.render_chat(
        model.metadata["tokenizer.chat_template"], to_messages(question, system), add_generation_prompt=True, **how
    )
