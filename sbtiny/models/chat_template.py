"""Put an instruction, a system turn and a place for a given budget into chat templates, and read them off one. Pure text.

Without `budget` in chat_template_kwargs the generation prompt ends as in training, and the model states its budget. With it, the tags
of the budget follow, exactly as `protocol.render_budget` writes them.
"""

import json
import re
from typing import Any

from sbtiny.budget.protocol import BUDGET_CLOSE, BUDGET_OPEN, FORMATS, Format
from sbtiny.config import PromptSettings
from sbtiny.errors import InputError

# Wraps a template: it renders the chat alone, and the generation prompt follows as a literal. The line breaks count.
BEFORE = "{% set answer_next = add_generation_prompt %}\n{% set add_generation_prompt = false %}\n"
AFTER = "{%% set add_generation_prompt = answer_next %%}{%% if add_generation_prompt %%}{{ %s }}{%% endif %%}"

# A chat that ends with an answer whose thoughts a server split off (`5</budget><think>...`) shows it as the model wrote it. From that
# llama.cpp learns where thoughts begin and end: else it would split no answer that has a budget before `<think>`.
SPLIT_OFF = "messages and messages[-1].role == 'assistant' and messages[-1].reasoning_content and messages[-1].content is string"
TAKE_ANSWER = (
    f"{{%% if not add_generation_prompt and {SPLIT_OFF} %%}}"
    "{%% set written_answer = '%s' ~ messages[-1].reasoning_content ~ '%s' ~ messages[-1].content %%}"
    "{%% set messages = messages[:-1] %%}{%% set add_generation_prompt = true %%}{%% endif %%}\n"
)
PUT_ANSWER = "{% if written_answer %}{{ written_answer }}{% set add_generation_prompt = false %}{% endif %}"

# Stands before a template: gives it the chat with the instruction in every user turn, and a system turn where the chat has none.
TEXT = r'"(?:[^"\\]|\\.)*"'
ASKED_WITH = re.compile(rf"{{% set asked_instruction = ({TEXT}) %}}{{% set asked_system = ({TEXT}) %}}")
ASK = (
    "{% set asked = namespace(messages=[]) %}"
    "{% if asked_system and not (messages and messages[0].role == 'system') %}"
    "{% set asked.messages = [{'role': 'system', 'content': asked_system}] %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role != 'user' or not asked_instruction %}{% set asked.messages = asked.messages + [message] %}"
    "{% elif message.content is string %}"
    "{% set asked.messages = asked.messages + [{'role': 'user', 'content': message.content + asked_instruction}] %}"
    "{% else %}{% set parts = message.content + [{'type': 'text', 'text': asked_instruction}] %}"
    "{% set asked.messages = asked.messages + [{'role': 'user', 'content': parts}] %}{% endif %}{% endfor %}"
    "{% set messages = asked.messages %}\n"
)

SPECIAL = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}  # placeholders, of no tokenizer
USER, SYSTEM = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Be brief."}
EARLIER = [USER, {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"}, {"role": "user", "content": "2+2?"}]
CHATS = ([USER], [SYSTEM, USER], EARLIER, [SYSTEM, *EARLIER])
THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})


def ending(form: Format) -> str:
    return f"{{% if add_generation_prompt and budget %}}{BUDGET_OPEN}{{{{ budget }}}}{BUDGET_CLOSE}{form.opening}{{% endif %}}"


def with_budget(template: str, form: Format) -> str:
    """The template with a place for `budget`, and with `<think>` one for split thoughts. Drops a line break at its end, as Jinja does."""
    if template.endswith(ending(form)):
        return template
    asked_with, body = split_prompt(template.removesuffix("\n"))  # what is asked stays in front, where it is read
    if form.answered:
        body = TAKE_ANSWER % (BUDGET_OPEN, form.closing) + body + PUT_ANSWER
    return with_prompt(body + ending(form), asked_with)


def form_of_template(template: str | None) -> Format | None:
    """The format whose budget this template prefills; None for a template without one."""
    return next((form for form in FORMATS.values() if (template or "").endswith(ending(form))), None)


def with_prompt(template: str, prompt: PromptSettings) -> str:
    """The template with these settings in the place of those that it has; what is None stays as it is.

    Every user turn ends with the instruction, earlier ones too: so each is what training saw, and a turn reads the same when it has
    become history, which keeps its cached keys and values. A system turn of the chat's own takes the place of `system`, as it does in
    published templates with a system turn of their own.
    """
    own, rest = split_prompt(template)
    instruction = (own if prompt.instruction is None else prompt).instruction
    system = (own if prompt.system is None else prompt).system
    if not (instruction or system):
        return rest
    texts = {"asked_instruction": f"\n{instruction}" if instruction else "", "asked_system": system or ""}
    given = [f"{{% set {name} = {json.dumps(text, ensure_ascii=False)} %}}" for name, text in texts.items()]
    return "".join([*given, ASK, rest])


def split_prompt(template: str | None) -> tuple[PromptSettings, str]:
    """The instruction and the system turn that `with_prompt` put into a template, None for none, and the template without them."""
    found = ASKED_WITH.match(template or "")
    if not found or not template.startswith(ASK, found.end()):
        return PromptSettings(), template or ""
    instruction, system = (json.loads(text) or None for text in found.groups())
    return PromptSettings(instruction=instruction and instruction.removeprefix("\n"), system=system), template[found.end() + len(ASK) :]


def strip_generation_think(template: str | None, form: Format) -> str | None:
    """The template without `<think>` in its generation prompt (R1 has one), because the budget comes before it.

    Everything before the generation prompt stays as it is. Raises InputError for a template that cannot be changed so.
    """
    if not template or not form.answered or not opens_body(template, form):
        return template
    start, _, _ = generation_prompt(template, CHATS[0]).partition(form.opening)
    literal = json.dumps(start, ensure_ascii=False)  # a string of Jinja's as well
    wrapped = BEFORE + template.removesuffix("\n") + AFTER % literal
    for chat in chats(template):
        alone, prompt = render_chat(template, chat), render_chat(template, chat, add_generation_prompt=True)
        same = prompt.startswith(alone) and prompt.removeprefix(alone).partition(form.opening)[0] == start
        if not same or (render_chat(wrapped, chat), render_chat(wrapped, chat, add_generation_prompt=True)) != (alone, alone + start):
            raise InputError(
                f"this chat template opens {form.opening} in a generation prompt that is not the same after every chat: "
                f"end the prompt in the model's chat_template.jinja before {form.opening}, or use --format solution"
            )
    return wrapped


def opens_body(template: str, form: Format) -> bool:
    """Whether a generation prompt opens the body, with thinking on, off or by default. It may close it at once."""
    return any(form.opening in generation_prompt(template, chat, **how) for chat in chats(template) if len(chat) < 3 for how in THINKING)


def chats(template: str) -> list[list[dict[str, str]]]:
    """The test chats that the template can render; some templates have no system messages."""
    known = [CHATS[0]]  # every template must render this one
    for chat in CHATS[1:]:
        try:
            render_chat(template, chat)
        except Exception:  # a template is a program and raises anything
            continue
        known.append(chat)
    return known


def generation_prompt(template: str, chat: list[dict[str, str]], **how: Any) -> str:
    """The generation prompt: the text that `add_generation_prompt` puts at the end."""
    alone, prompt = render_chat(template, chat, **how), render_chat(template, chat, add_generation_prompt=True, **how)
    return prompt.removeprefix(alone)


def render_chat(template: str, chat: list[dict[str, str]], **how: Any) -> str:
    """The text of a chat, rendered as in transformers, vLLM and SGLang."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([chat], chat_template=template, **(SPECIAL | how))
    return texts[0]
