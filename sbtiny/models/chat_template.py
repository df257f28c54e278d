"""Chat templates and the budget: where a user's goes in, and which format a template was made for. Pure text.

Without `budget` the generation prompt ends where training ended it, and the model states its budget by itself; with it, the tags stand
there already written, exactly as `protocol.prefill` writes them. `budget` comes in chat_template_kwargs.
"""

import json
from typing import Any

from sbtiny.budget.protocol import BUDGET_CLOSE, BUDGET_OPEN, FORMATS, Format
from sbtiny.errors import InputError

# Around a template: it renders the chat alone, and the generation prompt follows as text. Line breaks as at the beginning of a file.
BEFORE = "{% set answer_next = add_generation_prompt %}\n{% set add_generation_prompt = false %}\n"
AFTER = "{%% set add_generation_prompt = answer_next %%}{%% if add_generation_prompt %%}{{ %s }}{%% endif %%}"

SPECIAL = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}  # any: those of no tokenizer
USER, SYSTEM = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Be brief."}
EARLIER = [USER, {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"}, {"role": "user", "content": "2+2?"}]
CHATS = ([USER], [SYSTEM, USER], EARLIER, [SYSTEM, *EARLIER])
THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})


def ending(form: Format) -> str:
    return f"{{% if add_generation_prompt and budget %}}{BUDGET_OPEN}{{{{ budget }}}}{BUDGET_CLOSE}{form.opening}{{% endif %}}"


def with_budget(template: str, form: Format) -> str:
    """The template with a place for `budget`. Jinja drops one line break at a template's end, so it must go before more follows."""
    return template if template.endswith(ending(form)) else template.removesuffix("\n") + ending(form)


def form_of_template(template: str | None) -> Format | None:
    """The format that a template of ours prefills; None for one from elsewhere."""
    return next((form for form in FORMATS.values() if (template or "").endswith(ending(form))), None)


def fitted(template: str | None, form: Format) -> str | None:
    """The template a policy of this format is asked with: the budget comes before `<think>`, so the prompt must not open it (R1 does).

    Everything before the generation prompt stays as it is. Raises InputError for a template where that cannot be had.
    """
    if not template or not form.answered or not opens(template, form):
        return template
    start, _, _ = added(template, CHATS[0]).partition(form.opening)
    literal = json.dumps(start, ensure_ascii=False)  # a string of Jinja's as well
    wrapped = BEFORE + template.removesuffix("\n") + AFTER % literal
    for chat in chats(template):
        alone, asked = rendered(template, chat), rendered(template, chat, add_generation_prompt=True)
        same = asked.startswith(alone) and asked.removeprefix(alone).partition(form.opening)[0] == start
        if not same or (rendered(wrapped, chat), rendered(wrapped, chat, add_generation_prompt=True)) != (alone, alone + start):
            raise InputError(
                f"this chat template opens {form.opening} in a generation prompt that is not the same behind every chat: "
                f"end the prompt in the model's chat_template.jinja before {form.opening}, or use --format solution"
            )
    return wrapped


def opens(template: str, form: Format) -> bool:
    """Whether a generation prompt opens the body, be it to close it at once, with thinking wanted or unwanted."""
    return any(form.opening in added(template, chat, **how) for chat in chats(template) if len(chat) < 3 for how in THINKING)


def chats(template: str) -> list[list[dict[str, str]]]:
    """The chats that the template knows; some have no system messages."""
    known = [CHATS[0]]
    for chat in CHATS[1:]:
        try:
            rendered(template, chat)
        except Exception:  # a template is a program and raises anything; the chat it must know is the first
            continue
        known.append(chat)
    return known


def added(template: str, chat: list[dict[str, str]], **how: Any) -> str:
    """What `add_generation_prompt` puts at the end."""
    alone, asked = rendered(template, chat, **how), rendered(template, chat, add_generation_prompt=True, **how)
    return asked.removeprefix(alone)


def rendered(template: str, chat: list[dict[str, str]], **how: Any) -> str:
    """The text of a chat as transformers makes it, and with it vLLM and SGLang."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([chat], chat_template=template, **(SPECIAL | how))
    return texts[0]
