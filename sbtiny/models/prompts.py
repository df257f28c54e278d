"""What a model reads before its answer, and the tokens that end one: its chat template in ids. Imports neither torch nor transformers."""

from typing import TYPE_CHECKING

from sbtiny.budget.protocol import Format
from sbtiny.budget.template import fitted
from sbtiny.errors import InputError
from sbtiny.models.sentencepiece import SPACE

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def fit_template(tokenizer: "PreTrainedTokenizerBase", form: Format) -> None:
    """Give the tokenizer the chat template that a policy of this format is asked with, if it has one at all.

    Raises InputError for a template that fails, leaves out a question given as text, or cannot be fitted to the format.
    """
    if not tokenizer.chat_template:
        return
    question = "What is 3 + 4?"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"this model's chat template fails on a plain question ({reason}): mend its chat_template.jinja") from error
    if question not in text:
        raise InputError(f"this model's chat template leaves out a question given as text ({text[:60]!r}): use a model asked in text")
    tokenizer.chat_template = fitted(tokenizer.chat_template, form)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    """Token ids of a user's question in the model's chat template, ready for its answer."""
    if not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: use an instruct model, or add chat_template.jinja to it")
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def inner_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text that goes on from another, without the space that SentencePiece puts before every text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids or not tokenizer.tokenize("a")[0].startswith(SPACE):
        return ids
    before = tokenizer.encode("\n", add_special_tokens=False)
    return tokenizer.encode("\n" + text, add_special_tokens=False)[len(before) :]


def stop_ids(model: "nn.Module", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Every token that ends an answer: the generation config's, the tokenizer's, and the chat template's end of turn.

    Raises InputError when there is none or one lies outside the vocabulary.
    """
    return stop_ids_of(model.generation_config, tokenizer, model.get_input_embeddings().weight.shape[0])


def stop_ids_of(
    generation: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase", vocabulary: int
) -> frozenset[int]:
    """`stop_ids` of a model whose weights are not at hand; `vocabulary` is the number of rows of its embedding."""
    configured = generation.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    found = {*configured, tokenizer.eos_token_id, turn_end(tokenizer)} - {None}
    if not found:
        raise InputError("this model names no end token: set eos_token_id in its generation_config.json")
    if outside := [i for i in found if not 0 <= i < vocabulary]:
        raise InputError(f"stop token {outside[0]} is outside the vocabulary of {vocabulary}: fix the eos_token_id")
    return frozenset(found)


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token the chat template puts right after an assistant's answer, if it puts one."""
    if not tokenizer.chat_template:
        return None
    answer = "0123456789"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    _, found, tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False)[:1] if found else []
    added = tokenizer.added_tokens_decoder
    return next((i for i in ids if i in added and added[i].special), None)
