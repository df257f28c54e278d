"""Fitting changes a template in its generation prompt alone: tested on all of TRL's templates and on odd ones."""

from pathlib import Path

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sbtiny.budget.protocol import FORMATS, SOLUTION, THINK, Format, render_budget
from sbtiny.errors import InputError
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.chat_template import form_of_template, strip_generation_think, with_budget
from sbtiny.models.prompt import fit_template

FOLDER = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
TEMPLATES = sorted(FOLDER.glob("*.jinja"))

ASK, AGAIN = {"role": "user", "content": "What is 1+1?"}, {"role": "user", "content": "And 2+2?"}
SYSTEM = {"role": "system", "content": "Be <think> brief."}
ANSWERS = (
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
    {"role": "assistant", "content": "2"},
    {"role": "assistant", "content": "2", "reasoning_content": "add"},
)
CHATS = [[ASK], *([ASK, answer, AGAIN] for answer in ANSWERS), [ASK, ANSWERS[0], AGAIN, ANSWERS[1], ASK]]
CHATS += [[SYSTEM, *chat] for chat in CHATS]
WAYS = ({}, {"enable_thinking": True}, {"enable_thinking": False})

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
R1 = (FOLDER / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")


def text_of(template: str, chat: list[dict], **how: object) -> str:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return render_jinja_template([chat], chat_template=template, **special, **how)[0][0]


def known(template: str) -> list[list[dict]]:
    """Some templates have no system messages, some want content in parts."""
    chats = []
    for chat in CHATS:
        try:
            text_of(template, chat)
        except TemplateError:
            continue
        chats.append(chat)
    return chats


def prompt_of(template: str, chat: list[dict], **how: object) -> tuple[str, str]:
    """The chat, and its generation prompt."""
    alone = text_of(template, chat, add_generation_prompt=False, **how)
    prompt = text_of(template, chat, add_generation_prompt=True, **how)
    return alone, prompt.removeprefix(alone)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_only_the_generation_prompt_of_a_known_template_changes(file: Path, form: Format) -> None:
    template = file.read_text(encoding="utf-8")
    changed = strip_generation_think(template, form)
    chats = known(template)
    assert [ASK] in chats
    for chat in chats:
        for how in WAYS:
            before, after = prompt_of(template, chat, **how), prompt_of(changed, chat, **how)
            if changed == template:
                assert form is SOLUTION or not after[1].rstrip().endswith(("<think>", "</think>"))
            else:
                assert form is THINK
                assert after == (before[0], prompt_of(template, chat)[1].partition("<think>")[0])
    assert strip_generation_think(changed, form) == changed


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_a_known_template_as_exported_has_a_place_for_a_budget(file: Path, form: Format) -> None:
    template = strip_generation_think(file.read_text(encoding="utf-8"), form)
    exported = with_budget(template, form)
    for chat in known(template):
        prompt = text_of(template, chat, add_generation_prompt=True)
        assert text_of(exported, chat, add_generation_prompt=True) == prompt
        assert text_of(exported, chat, add_generation_prompt=True, budget=70) == prompt + render_budget(70, form)
        assert text_of(exported, chat, budget=70) == text_of(template, chat)
    assert form_of_template(exported) is form
    assert strip_generation_think(exported, form) == exported


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_thoughts_that_a_server_split_off_are_shown_as_the_model_wrote_them(file: Path) -> None:
    template = strip_generation_think(file.read_text(encoding="utf-8"), THINK)
    exported, split = with_budget(template, THINK), ANSWERS[2] | {"reasoning_content": "7</budget><think>add"}
    for chat in known(template):
        whole = text_of(template, chat, add_generation_prompt=True) + "<budget>7</budget><think>add</think>2"
        assert text_of(exported, [*chat, split]) == text_of(exported, [*chat, split], budget=70) == whole


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}", "<|im_start|>assistant\n"),
        ("{%- if add_generation_prompt -%}<|a|><think>{%- endif -%}\n", "<|a|>"),
        ('{% if add_generation_prompt %}{{ "<|a|>" ~ "\\n" ~ "<think>" ~ "\\n" }}{% endif %}', "<|a|>\n"),
        ("{{ '<|a|><think>\n\n</think>\n\n' if add_generation_prompt else '' }}", "<|a|>"),
        ("{% set open = '<think>' %}{% if add_generation_prompt %}<|a|>'\"\\n{{ open }}{% endif %}", "<|a|>'\"\\n"),
        ("{% if add_generation_prompt %}<|a|>{% if enable_thinking is not false %}<think>\n{% endif %}{% endif %}", "<|a|>"),
        ("{% if add_generation_prompt %}\n\n  <|a|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}", "\n  <|a|>"),
    ],
)
@pytest.mark.parametrize("head", ["", "\n", "  {% if true %}\n  {% endif %}", "{#- A comment. -#}\n\n"])
def test_a_prompt_is_found_however_it_is_written(head: str, prompt: str, start: str) -> None:
    template = head + CHATML + prompt
    for plain in (False, True):  # as llama-cpp-python's environment renders it as well
        for chat in CHATS:
            changed = strip_generation_think(template, THINK)
            assert prompt_of(changed, chat) == (text_of(template, chat), start)
            if plain:
                made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(changed)
                assert made.render(messages=chat, add_generation_prompt=True) == text_of(changed, chat, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        CHATML + "{% if add_generation_prompt %}<|{{ messages|length }}|><think>{% endif %}",  # another prompt after every chat
        CHATML + "{% if add_generation_prompt %}<|a|><think>{% else %}<|end|>{% endif %}",  # another chat where there is a prompt
        "{% if add_generation_prompt %}Think.{% endif %}" + CHATML + "{% if add_generation_prompt %}<|a|><think>{% endif %}",
    ],
)
def test_a_prompt_that_cannot_be_told_from_the_chat_is_refused(template: str) -> None:
    with pytest.raises(InputError, match=r"opens <think> in a generation prompt .* or use --format solution"):
        strip_generation_think(template, THINK)
    assert strip_generation_think(template, SOLUTION) == template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token + messages[0].content }}{% if", "fails on a plain question (TemplateSyntaxError:"),
        ("{{ raise_exception('no chats') }}", "fails on a plain question (TemplateError: no chats)"),
        ("{{ messages[0].content + 1 }}", "fails on a plain question (TypeError:"),
        ((FOLDER / "smolvlm.jinja").read_text(encoding="utf-8"), "leaves out a question given as text ('<|im_start|>User: <end_of_utt"),
    ],
)
def test_a_template_of_no_use_is_one_line(template: str, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.chat_template = template
    with pytest.raises(InputError) as error:
        fit_template(tokenizer, SOLUTION)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_qwq_is_asked_with() -> None:
    """As published with QwQ-32B: Qwen2.5's, whose prompt opens the thoughts and whose earlier answers lose them."""
    template, closes = (FOLDER / "qwen2_5.jinja").read_text(encoding="utf-8"), "message.content.split('</think>')[-1].lstrip('\\n')"
    start = "<|im_start|>assistant\\n' }}"
    assert template.count(start) == 1
    opens = template.replace(start, "<|im_start|>assistant\\n<think>\\n' }}").replace("+ message.content +", f"+ {closes} +")
    assert prompt_of(opens, [ASK])[1] == "<|im_start|>assistant\n<think>\n"
    assert "add" not in text_of(opens, CHATS[1])
    for chat in CHATS:
        changed = strip_generation_think(opens, THINK)
        assert prompt_of(changed, chat) == (text_of(opens, chat), "<|im_start|>assistant\n")
        assert strip_generation_think(opens, SOLUTION) == opens


def test_what_r1_is_asked_with() -> None:
    """It opens the thoughts: the paper's tags go inside them, ours before them."""
    assert prompt_of(strip_generation_think(R1, SOLUTION), [ASK])[1] == "<｜Assistant｜><think>\n"
    exported = with_budget(strip_generation_think(R1, THINK), THINK)
    assert text_of(exported, [ASK], add_generation_prompt=True) == "<s><｜User｜>What is 1+1?<｜Assistant｜>"
    assert text_of(exported, [ASK], add_generation_prompt=True, budget=70).endswith("<｜Assistant｜><budget>70</budget><think>")
