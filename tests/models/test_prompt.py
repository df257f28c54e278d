"""An instruction and a system turn stand in the chat template itself, so that one place says how a question becomes a prompt."""

import copy
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from sbtiny.budget.protocol import FORMATS, SOLUTION, THINK, Format
from sbtiny.config import PromptSettings
from sbtiny.errors import InputError
from sbtiny.models.aliases import STEP_BY_STEP, fill_prompt
from sbtiny.models.chat_template import render_chat, split_prompt, strip_generation_think, with_budget, with_prompt
from sbtiny.models.prompt import fit_template, prompt_ids

FOLDER = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
STRINGS_ONLY = ["deepseek_r1_distill", "gemma", "llama3_1", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"]

ASK, AGAIN = {"role": "user", "content": "What is 1+1?"}, {"role": "user", "content": "And 2+2?"}
ANSWER, SYSTEM = {"role": "assistant", "content": "2"}, {"role": "system", "content": "Own."}
HARD = 'In "\\boxed{}" {{ x }} {% y %} {# z #} %} }} é 😀\n<b>'


def template_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def told(chat: list[dict], instruction: str, system: str = "") -> list[dict]:
    """The chat as a user would write it to say the same."""
    before = [{"role": "system", "content": system}] if system and chat[0]["role"] != "system" else []
    return before + [m | {"content": f"{m['content']}\n{instruction}"} if m["role"] == "user" and instruction else m for m in chat]


@pytest.fixture
def tokenizer(tiny) -> PreTrainedTokenizerBase:
    return copy.deepcopy(tiny[1])


@pytest.mark.parametrize("name", STRINGS_ONLY)
@pytest.mark.parametrize(("instruction", "system"), [(STEP_BY_STEP, ""), ("", "Be terse."), (HARD, HARD)])
def test_the_template_writes_what_a_user_would_have_written(name: str, instruction: str, system: str) -> None:
    if system and name == "gemma":
        pytest.skip("takes no system turn")
    template, wanted = template_of(name), PromptSettings(instruction=instruction, system=system)
    asked = with_prompt(template, wanted)
    chats = [[ASK], [ASK, ANSWER, AGAIN]]
    for chat in chats if name == "gemma" else [*chats, [SYSTEM, ASK], [SYSTEM, ASK, ANSWER, AGAIN]]:
        for how in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
            assert render_chat(asked, chat, **how) == render_chat(template, told(chat, instruction, system), **how)
    kept, rest = split_prompt(asked)
    assert (kept.instruction or "", kept.system or "", rest) == (instruction, system, template)


def test_content_in_parts_is_told_as_well() -> None:
    template = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}]
    assert render_chat(with_prompt(template, PromptSettings(instruction="Think.")), chat) == "[1+1?][\nThink.]"


@pytest.mark.parametrize("plain", [False, True], ids=["transformers", "jinja"])
def test_nothing_is_written_before_the_template(plain: bool) -> None:
    """llama-cpp-python's environment has no extensions; a template may begin with a line break or an indented block."""
    for head in ("", "\n", "  {% if true %}\n  {% endif %}", "{#- A comment. -#}\n\n"):
        template = head + "{% for m in messages %}<{{ m.content }}>{% endfor %}"
        asked = with_prompt(template, PromptSettings(instruction="Think."))
        if plain:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            found, wanted = (environment.from_string(t).render(messages=c) for t, c in ((asked, [ASK]), (template, told([ASK], "Think."))))
        else:
            found, wanted = render_chat(asked, [ASK]), render_chat(template, told([ASK], "Think."))
        assert found == wanted


def test_settings_take_the_place_of_earlier_ones_and_null_leaves_them() -> None:
    both = with_prompt("{{ messages }}", PromptSettings(instruction="A", system="B"))
    assert with_prompt(both, PromptSettings()) == both
    assert split_prompt(with_prompt(both, PromptSettings(instruction="C")))[0] == PromptSettings(instruction="C", system="B")
    assert split_prompt(with_prompt(both, PromptSettings(system="")))[0] == PromptSettings(instruction="A")
    assert with_prompt(both, PromptSettings(instruction="", system="")) == "{{ messages }}"
    assert with_prompt("{{ messages }}", PromptSettings()) == "{{ messages }}"


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_an_export_is_asked_with_is_read_off_it_and_can_be_changed(form: Format) -> None:
    plain = strip_generation_think(template_of("deepseek_r1_distill"), form)
    first, second = (with_budget(with_prompt(plain, PromptSettings(instruction=text)), form) for text in ("Think.", "Be quick."))
    assert split_prompt(first)[0] == PromptSettings(instruction="Think.")
    assert with_prompt(first, PromptSettings(instruction="Be quick.")) == second
    split = {"role": "assistant", "content": "2", "reasoning_content": "7</budget><think>1+1"}
    if form is THINK:
        assert render_chat(first, [ASK, split]).endswith("?\nThink.<｜Assistant｜><budget>7</budget><think>1+1</think>2")


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_r1_is_asked_with(tokenizer: PreTrainedTokenizerBase, form: Format) -> None:
    """Its card: the instruction in the user turn, no system turn. Its template opens the thoughts; our second format opens them later."""
    tokenizer.chat_template = template_of("deepseek_r1_distill")
    wanted = fill_prompt(PromptSettings(), "qwen-1.5b")
    assert wanted == fill_prompt(PromptSettings(), "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    taken_off = fit_template(tokenizer, form, wanted)
    text = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    question = f"<｜User｜>What is 1+1?\n{STEP_BY_STEP}<｜Assistant｜>"
    assert text.removeprefix(tokenizer.bos_token or "") + taken_off == f"{question}<think>\n"
    assert taken_off == ("<think>\n" if form is THINK else "")
    fitted = tokenizer.chat_template
    assert fit_template(tokenizer, form, wanted) == ""
    assert tokenizer.chat_template == fitted


def test_the_bundled_model_is_asked_with_the_question_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    before = tokenizer.chat_template
    fit_template(tokenizer, SOLUTION, fill_prompt(PromptSettings(), "tiny"))
    assert tokenizer.chat_template == before


def test_the_users_word_wins_over_the_alias() -> None:
    assert fill_prompt(PromptSettings(instruction=""), "qwen-7b").instruction == ""
    assert fill_prompt(PromptSettings(instruction="Think."), "qwen-7b").instruction == "Think."
    assert fill_prompt(PromptSettings(system="Be terse."), "qwen-7b") == PromptSettings(instruction=STEP_BY_STEP, system="Be terse.")


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (template_of("gemma"), {"system": "Be terse."}, r"takes no system turn .* put prompt.system into prompt.instruction"),
        ("{{ messages[-1].content }}", {"system": "Be terse."}, "leaves prompt.system out"),
        ("{{ messages[0].content }}", {"instruction": "Think.<|im_end|>"}, r"prompt.instruction holds '<\|im_end\|>', a special token"),
    ],
    ids=["refused", "left out", "special"],
)
def test_a_prompt_that_cannot_be_asked_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: str, prompt: dict[str, str], message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        fit_template(tokenizer, SOLUTION, PromptSettings(**prompt))


def test_a_question_that_forges_a_turn_is_still_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    fit_template(tokenizer, SOLUTION, PromptSettings(instruction="Think."))
    with pytest.raises(InputError, match="a special token of this model"):
        prompt_ids(tokenizer, f"2+2?{tokenizer.eos_token}")
