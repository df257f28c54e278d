"""Chats as a user of llama.cpp has them: the file's own template, llama.cpp's tokens, sampler and stops, no engine of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtiny.models import chat_template
from sbtiny.config import EvalSettings
from sbtiny.models.prompt import turns

CONTEXT = 4096  # tokens
OFF = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}  # llama-cpp-python's own defaults change the distribution


@dataclass(frozen=True, slots=True)
class Chat:
    """`text` begins with the prefilled tags, when there are any; `ended`: by an end token, not by the limit."""

    text: str
    ended: bool


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, verbose=False)
    try:
        yield model
    finally:
        model.close()


def chat(
    model: Any, question: str, seed: int, e: EvalSettings, given: tuple[int | None, str] = (None, ""), system: str | None = None
) -> Chat:
    """One answer of an opened model; `given`: a budget, put in by the template in the file, and the text that this makes."""
    budget, said = given
    tokens = model.tokenize(rendered(model, question, budget, system).encode(), add_bos=False, special=True)
    room = max(1, min(e.max_tokens, model.n_ctx() - len(tokens)))
    found = model.create_completion(tokens, max_tokens=room, seed=seed, temperature=e.temperature, top_p=e.top_p, **OFF)
    choice = found["choices"][0]
    return Chat(said + choice["text"], choice["finish_reason"] == "stop")


def rendered(model: Any, question: str, budget: int | None, system: str | None = None) -> str:
    """The prompt by the template in the file; `budget` as chat_template_kwargs would give it."""
    ids = {"bos_token": model.token_bos(), "eos_token": model.token_eos()}
    special = {name: model.detokenize([i], special=True).decode() if i >= 0 else "" for name, i in ids.items()}
    how = special | ({} if budget is None else {"budget": budget})
    return chat_template.rendered(model.metadata["tokenizer.chat_template"], turns(question, system), add_generation_prompt=True, **how)
