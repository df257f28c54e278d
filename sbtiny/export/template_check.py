"""Proof that the chat template of the files is the one of training, with a place for a user's budget (`models/chat_template.py`)."""

from typing import TYPE_CHECKING

from sbtiny.budget.protocol import Format, prefill
from sbtiny.models.chat_template import with_budget
from sbtiny.errors import InputError
from sbtiny.models.prompt import inner_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = (1, 37, 250, 4096)


def check_prompts(tokenizer: "PreTrainedTokenizerBase", form: Format) -> None:
    """Raises InputError unless the template as exported will give the ids of training, with a budget and without.

    Training asks as well, before it begins: a run that cannot be exported is of no use.
    """
    question = "What is 3 + 4?\nThink."
    wanted = prompt_ids(tokenizer, question)
    messages, exported = [{"role": "user", "content": question}], with_budget(tokenizer.chat_template, form)

    def ids(**budget: int) -> list[int]:
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return tokenizer.apply_chat_template(messages, chat_template=exported, **how, **budget)

    if ids() != wanted or any(ids(budget=n) != wanted + inner_ids(tokenizer, prefill(n, form)) for n in PROBE):
        raise InputError("this chat template merges a budget into its last token: end its generation prompt with a line break")
