"""Prompts as token ids of the chat template, and the tokens that end an answer. Imports neither torch nor transformers."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sbtiny.budget.protocol import THINK, Format, render_budget
from sbtiny.config import PromptSettings
from sbtiny.errors import InputError
from sbtiny.models.chat_template import USER, generation_prompt, split_prompt, strip_generation_think, with_budget, with_prompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Message = dict[str, str]  # role and content
SPACE = "▁"  # SentencePiece's mark of a space
PLAIN = PromptSettings()
PROBE_BUDGETS = (1, 37, 250, 4096)


def fit_template(tokenizer: "PreTrainedTokenizerBase", form: Format, prompt: PromptSettings = PLAIN) -> str:
    """Fit the tokenizer's chat template, if it has one, to prompts with these settings and for this format.

    From here on the template alone says how a question becomes a prompt: here, in the trainers and in an export. Returns what the
    format takes off the generation prompt (`<think>` and a line break), "" for nothing. Raises InputError for a template that fails,
    leaves out a question given as text, the instruction or the system turn, or cannot be fitted.
    """
    if not tokenizer.chat_template:
        return ""
    asked_with, own = split_prompt(with_prompt(tokenizer.chat_template, prompt))
    tokenizer.chat_template = own
    check_question(tokenizer)
    fitted = strip_generation_think(own, form)
    tokenizer.chat_template = with_prompt(fitted, asked_with)
    check_prompt(tokenizer, asked_with)
    return "" if fitted == own else generation_prompt(own, [USER]).removeprefix(generation_prompt(fitted, [USER]))


def check_question(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError for a chat template that fails on a question, or leaves it out."""
    question = "What is 3 + 4?"
    try:
        text = tokenizer.apply_chat_template(to_messages(question), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"this model's chat template fails on a plain question ({reason}): correct its chat_template.jinja") from error
    if question not in text:
        raise InputError(f"this model's chat template leaves out a question given as text ({text[:60]!r}): use a model that takes text")


def check_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: PromptSettings) -> None:
    """Raise InputError for an instruction or system turn that holds a special token, or that the chat template does not write."""
    from jinja2 import TemplateError

    texts = {name: text for name, text in asdict(prompt).items() if text}
    for name, text in texts.items():
        if token := find_token(text, special_tokens(tokenizer)):
            raise InputError(f"prompt.{name} holds {token!r}, a special token of this model: take it out")
    try:
        whole = tokenizer.apply_chat_template(to_messages("?"), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"this model's chat template takes no system turn ({error}): put prompt.system into prompt.instruction") from error
    if left_out := [name for name, text in texts.items() if text.strip() not in whole]:
        raise InputError(f"this model's chat template leaves prompt.{left_out[0]} out or changes it: reword it, or use the other")


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", question: str | Sequence[Message], system: str | None = None) -> list[int]:
    """Token ids of system turn and question in the chat template, up to the answer. In place of a question: all turns of a chat.

    Raises InputError for a special token in the texts, because it would forge a turn, and for a template without system turns.
    """
    messages = to_messages(question, system) if isinstance(question, str) else list(question)
    for message in messages:
        if token := find_token(message["content"], special_tokens(tokenizer)):
            raise InputError(f"the {message['role']} turn holds {token!r}, a special token of this model: take it out")
    return rendered(tokenizer, messages, tokenize=True, return_dict=False)


def to_messages(question: str, system: str | None = None) -> list[Message]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], **how: bool) -> Any:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: use an instruct model, or add chat_template.jinja to it")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **how)
    except TemplateError as error:
        if len(messages) == 1:
            raise
        if messages[0]["role"] == "system":
            raise InputError(f"this model's chat template takes no system turn ({error}): put it into the question") from error
        raise InputError(f"this model's chat template does not take these turns ({error})") from error


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Texts of the tokenizer's special tokens. `<think>` and `</think>` count as words."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special and token.content and not THINK.tag.fullmatch(token.content)]


def find_token(text: str, tokens: Iterable[str]) -> str:
    """The first of the tokens that a text contains; empty if none."""
    return next((token for token in tokens if token in text), "")


def check_texts(tokenizer: "PreTrainedTokenizerBase", items: Iterable[Any]) -> None:
    """Raises InputError, with its location, for a text that holds a special token or a system turn that the template drops.

    `items`: Questions, Traces or labelled rows.
    """
    special, systems = special_tokens(tokenizer), set()
    for item in items:
        texts = {"question": item.question, "system turn": item.system, "response": getattr(item, "response", None)}
        for name, text in texts.items():
            if token := find_token(text or "", special):
                raise InputError(f"{item.location}: the {name} holds {token!r}, a special token of this model: take it out")
        if item.system and item.system not in systems:
            systems.add(item.system)
            check_system(tokenizer, item.system, item.location)


def check_system(tokenizer: "PreTrainedTokenizerBase", system: str, location: str) -> None:
    try:
        whole = rendered(tokenizer, to_messages("?", system), tokenize=False)
    except InputError as error:
        raise InputError(f"{location}: {error}") from error
    if system not in whole:
        raise InputError(f"{location}: this model's chat template leaves the system turn out: put it into the question")


def continuation_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text that continues another, without the space that SentencePiece puts before every text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids or not tokenizer.tokenize("a")[0].startswith(SPACE):
        return ids
    before = tokenizer.encode("\n", add_special_tokens=False)
    return tokenizer.encode("\n" + text, add_special_tokens=False)[len(before) :]


def stop_ids(model: "nn.Module", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """All tokens that end an answer: those of generation config, tokenizer, and chat template (end of turn).

    Raises InputError when there is none or one lies outside the vocabulary.
    """
    return stop_ids_of(model.generation_config, tokenizer, model.get_input_embeddings().weight.shape[0])


def stop_ids_of(generation: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> frozenset[int]:
    """`stop_ids` without the weights. `vocabulary`: rows of the embedding."""
    configured = generation.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    stops = {*configured, tokenizer.eos_token_id, turn_end(tokenizer)} - {None}
    if not stops:
        raise InputError("this model names no end token: set eos_token_id in its generation_config.json")
    if outside := [i for i in stops if not 0 <= i < vocabulary]:
        raise InputError(f"stop token {outside[0]} is outside the vocabulary of {vocabulary}: fix the eos_token_id")
    return frozenset(stops)


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token right after an assistant's answer in the chat template; None if there is none."""
    if not tokenizer.chat_template:
        return None
    answer = "0123456789"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    _, found, tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False)[:1] if found else []
    added = tokenizer.added_tokens_decoder
    return next((i for i in ids if i in added and added[i].special), None)


def check_prompts(tokenizer: "PreTrainedTokenizerBase", form: Format) -> None:
    """Raises InputError unless the exported template gives the ids of training, with a given budget and without.

    Training checks this first, because a run that cannot be exported is useless.
    """
    question = "What is 3 + 4?\nThink."
    wanted = prompt_ids(tokenizer, question)
    messages, exported = [{"role": "user", "content": question}], with_budget(tokenizer.chat_template, form)

    def ids(**budget: int) -> list[int]:
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return tokenizer.apply_chat_template(messages, chat_template=exported, **how, **budget)

    if ids() != wanted or any(ids(budget=n) != wanted + continuation_ids(tokenizer, render_budget(n, form)) for n in PROBE_BUDGETS):
        raise InputError("this chat template merges a budget into its last token: end its generation prompt with a line break")
