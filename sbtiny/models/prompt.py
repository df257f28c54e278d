"""What a model reads before its answer, and the tokens that end one: its chat template in ids. Imports neither torch nor transformers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sbtiny.budget.protocol import THINK, Format
from sbtiny.models.chat_template import fitted
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


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", question: str, system: str | None = None) -> list[int]:
    """Token ids of a user's question in the model's chat template, behind what the chat is set to, ready for its answer.

    Raises InputError for a special token in the texts, which would forge a turn, and for a template that takes no system turn.
    """
    messages = turns(question, system)
    for message in messages:
        if token := first_in(message["content"], special_tokens(tokenizer)):
            raise InputError(f"the {message['role']} turn holds {token!r}, a special token of this model: take it out")
    return rendered(tokenizer, messages, tokenize=True, return_dict=False)


def turns(question: str, system: str | None = None) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], **how: bool) -> Any:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: use an instruct model, or add chat_template.jinja to it")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **how)
    except TemplateError as error:
        if len(messages) == 1:
            raise
        raise InputError(f"this model's chat template takes no system turn ({error}): put it into the question") from error


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts that the tokenizer reads as special tokens; the tags of thoughts are words, whatever it calls them."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special and token.content and not THINK.tag.fullmatch(token.content)]


def first_in(text: str, tokens: Iterable[str]) -> str:
    """The first of the tokens that stands in a text; empty where none does."""
    return next((token for token in tokens if token in text), "")


def check_texts(tokenizer: "PreTrainedTokenizerBase", items: Iterable[Any]) -> None:
    """Raises InputError with the place of a question, system turn or response that the model would not read as the text it is.

    An item is a Question, a Trace or a labelled row.
    """
    special, systems = special_tokens(tokenizer), set()
    for item in items:
        texts = {"question": item.question, "system turn": item.system, "response": getattr(item, "response", None)}
        for name, text in texts.items():
            if token := first_in(text or "", special):
                raise InputError(f"{item.named}: the {name} holds {token!r}, a special token of this model: take it out")
        if item.system and item.system not in systems:
            systems.add(item.system)
            check_system(tokenizer, item.system, item.named)


def check_system(tokenizer: "PreTrainedTokenizerBase", system: str, named: str) -> None:
    try:
        whole = rendered(tokenizer, turns("?", system), tokenize=False)
    except InputError as error:
        raise InputError(f"{named}: {error}") from error
    if system not in whole:
        raise InputError(f"{named}: this model's chat template leaves the system turn out: put it into the question")


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
