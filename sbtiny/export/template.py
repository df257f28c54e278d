"""Proof that the chat template of the files is the one of training, with a place for a user's budget (`budget/template.py`)."""

from typing import TYPE_CHECKING

from sbtiny.budget.protocol import Format, prefill
from sbtiny.errors import InputError
from sbtiny.models.prompts import inner_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = (1, 37, 250, 4096)


def check_prompts(trained: "PreTrainedTokenizerBase", exported: "PreTrainedTokenizerBase", form: Format) -> None:
    """Raises InputError unless the exported template gives the ids of training, with a budget and without."""
    question = "What is 3 + 4?\nThink."
    messages = [{"role": "user", "content": question}]

    def ids(**budget: int) -> list[int]:
        return exported.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **budget)

    wanted = prompt_ids(trained, question)
    same = ids() == wanted and all(
        ids(budget=n) == wanted + inner_ids(trained, prefill(n, form)) for n in PROBE
    )
    if not same:
        raise InputError("this chat template merges a budget into its last token: end its generation prompt with a line break")
