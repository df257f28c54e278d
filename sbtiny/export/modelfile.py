"""The texts beside the weights, from templates/: ollama's Modelfile, the README with the commands of each program, and the model card."""

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny import runs
from sbtiny.budget.protocol import BUDGET_OPEN, render_budget
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError
from sbtiny.export.config import ExportConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ANSWER, AGAIN = (f"\x00{name}\x00" for name in ("system", "user", "answer", "again"))
# In Go, for ollama: what stands before a first message with a system message and without, then every message and what follows it.
OPENING = "{{ if .System }}%(first)s{{ .System }}%(then)s{{ else }}%(start)s{{ end }}"
TURNS = (
    '{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "user" }}{{ .Content }}'
    "{{ if $last }}%(end)s{{ else }}%(between)s{{ end }}"
    '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}%(after)s{{ end }}{{ end }}{{ end }}'
)
LICENSE = re.compile(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", re.MULTILINE | re.DOTALL)


def render(name: str, /, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("sbtiny.export"), trim_blocks=True, keep_trailing_newline=True)
    environment.filters["quote"] = shlex.quote
    return environment.get_template(f"{name}.jinja").render(values)


def modelfile(gguf: str, tokenizer: "PreTrainedTokenizerBase", stops: list[int], e: EvalSettings, context: int) -> str:
    """The Modelfile: FROM, TEMPLATE, stops and the sampling of the evaluation."""
    stop_texts = tokenizer.convert_ids_to_tokens(stops)
    return render("Modelfile", gguf=gguf, template=go_template(tokenizer), stops=stop_texts, e=e, context=context)


def go_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template in ollama's language (Go), read off what the Jinja template puts around marked messages.

    Supports a system message first, then user and assistant in turn. Raises InputError for a template that changes messages.
    """
    from jinja2 import TemplateError

    parts = dict(zip(("start", "between", "after", "end"), _around(tokenizer, user=USER, assistant=ANSWER, again=AGAIN), strict=True))
    if any('"""' in part for part in parts.values()):
        raise InputError('the prompt holds """, which ends a Modelfile\'s template: reword prompt.instruction, or use --gguf none')
    try:
        parts["first"], parts["then"], _ = _around(tokenizer, system=SYSTEM, user=USER)
    except (TemplateError, InputError):  # a template without system messages
        return parts["start"] + TURNS % parts
    return (OPENING + TURNS) % parts


def _around(tokenizer: "PreTrainedTokenizerBase", **turns: str) -> list[str]:
    """The text before, between and after the turns of a chat, without a start token that the tokenizer adds anyway."""
    messages = [{"role": "user" if role == "again" else role, "content": mark} for role, mark in turns.items()]
    text = rest = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = []
    for mark in turns.values():
        before, found, rest = rest.partition(mark)
        if not found:
            raise InputError(f"this chat template changes its messages ({text[:60]!r}): no Modelfile can say the same; use --gguf none")
        parts.append(before)
    if tokenizer.bos_token and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        parts[0] = parts[0].removeprefix(tokenizer.bos_token)
    return [part.replace("{{", '{{ "{{" }}') for part in (*parts, rest)]


def readme(plan: ExportConfig, tokenizer: "PreTrainedTokenizerBase", gguf: str | None, composes: bool) -> str:
    """The README. `gguf`: the file that its commands take. `composes`: the tokenizer composes text (NFC), which llama.cpp does not."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], tokenize=False, add_generation_prompt=True)
    prefill = render_budget(200, plan.form)
    raw = json.dumps({"model": plan.name, "raw": True, "prompt": prompt + prefill, "stream": False})
    # vLLM's parser looks for the tags among the tokens.
    parser = "deepseek_r1" if plan.form.answered and {plan.form.opening, plan.form.closing} <= tokenizer.get_vocab().keys() else None
    texts = {"prompt": prompt, "prefill": prefill, "raw": raw, "budget_tag": BUDGET_OPEN}
    return render("README.md", plan=plan, e=plan.settings.eval, gguf=gguf, composes=composes, parser=parser, **texts)


def model_card(plan: ExportConfig, base: Path) -> str:
    """The model card of the merged folder: origin, licence and the run's evaluation, if it has one."""
    evaluation = plan.run / "eval.json"
    metrics = runs.read_json(evaluation) if evaluation.is_file() else None
    return render("model_card.md", plan=plan, license=find_license(plan, base), metrics=metrics)


def find_license(plan: ExportConfig, base: Path) -> str:
    """The licence in the base's own card, `other` where there is none."""
    if plan.source.kind == "bundled":
        return "apache-2.0"
    card = base / "README.md"
    found = LICENSE.match(card.read_text(encoding="utf-8")) if card.is_file() else None
    return found[1] if found else "other"
