"""The chat template that goes with the files: the one of training, and a place for a budget set by the user.

Without `budget` the generation prompt ends where training ended it, and the model states its number by itself; with it, the tags stand
there already written, exactly as `protocol.prefill` writes them. `budget` comes in chat_template_kwargs.
"""

from typing import TYPE_CHECKING

from sbtiny.budget.protocol import BUDGET_CLOSE, BUDGET_OPEN, SOLUTION_OPEN, prefill
from sbtiny.errors import InputError
from sbtiny.models.load import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = (1, 37, 250, 4096)
ENDING = f"{{% if add_generation_prompt and budget %}}{BUDGET_OPEN}{{{{ budget }}}}{BUDGET_CLOSE}{SOLUTION_OPEN}{{% endif %}}"


def with_budget(template: str) -> str:
    """The template with a place for `budget`. Jinja drops one line break at a template's end, so it must go before more follows."""
    return template if template.endswith(ENDING) else template.removesuffix("\n") + ENDING


def check_prompts(trained: "PreTrainedTokenizerBase", exported: "PreTrainedTokenizerBase") -> None:
    """Raises InputError unless the exported template gives the ids of training, with a budget and without."""
    question = "What is 3 + 4?\nThink."
    messages = [{"role": "user", "content": question}]

    def ids(**budget: int) -> list[int]:
        return exported.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **budget)

    wanted = prompt_ids(trained, question)
    same = ids() == wanted and all(
        ids(budget=n) == wanted + trained.encode(prefill(n), add_special_tokens=False) for n in PROBE
    )
    if not same:
        raise InputError("this chat template merges a budget into its last token: end its generation prompt with a line break")
