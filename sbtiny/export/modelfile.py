"""The texts beside the weights: ollama's Modelfile, the README with the commands of each program, and the model card."""

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtiny import runs
from sbtiny.budget.protocol import Format, render_budget
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError
from sbtiny.export.config import ExportConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ANSWER, AGAIN = (f"\x00{name}\x00" for name in ("system", "user", "answer", "again"))

HEADER = re.compile(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", re.MULTILINE | re.DOTALL)
SHARES = (("accuracy", "accuracy"), ("format_rate", "format right"))


def modelfile(gguf: str, tokenizer: "PreTrainedTokenizerBase", stops: list[int], e: EvalSettings, context: int) -> str:
    """The Modelfile: FROM, TEMPLATE, stops and the sampling of the evaluation."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go_template(tokenizer)}"""']
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(i)}"' for i in stops]
    lines += [f"PARAMETER temperature {e.temperature}", f"PARAMETER top_p {e.top_p}", "PARAMETER top_k 0", "PARAMETER min_p 0"]
    lines += ["PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {min(context, 8192)}"]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template in ollama's language (Go), read off what the Jinja template puts around marked messages.

    Supports a system message first, then user and assistant in turn. Raises InputError for a template that changes messages.
    """
    start, between, after, end = _around(tokenizer, [("user", USER), ("assistant", ANSWER), ("user", AGAIN)])
    first, then = _around_system(tokenizer)
    turns = (
        '{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "user" }}{{ .Content }}'
        f"{{{{ if $last }}}}{end}{{{{ else }}}}{between}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ if not $last }}}}{after}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}'
    )
    opening = start if first is None else f"{{{{ if .System }}}}{first}{{{{ .System }}}}{then}{{{{ else }}}}{start}{{{{ end }}}}"
    return opening + turns


def _around_system(tokenizer: "PreTrainedTokenizerBase") -> tuple[str | None, str | None]:
    """The text before and after a system message; None for templates without system messages."""
    from jinja2 import TemplateError

    try:
        first, then, _ = _around(tokenizer, [("system", SYSTEM), ("user", USER)])
    except (TemplateError, InputError):
        return None, None
    return first, then


def _around(tokenizer: "PreTrainedTokenizerBase", turns: list[tuple[str, str]]) -> list[str]:
    """The text before, between and after the turns of a chat, without a start token that the tokenizer adds anyway."""
    messages = [{"role": role, "content": content} for role, content in turns]
    text = rest = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = []
    for _, mark in turns:
        before, found, rest = rest.partition(mark)
        if not found:
            raise InputError(f"this chat template changes its messages ({text[:60]!r}): no Modelfile can say the same; use --gguf none")
        parts.append(before)
    bos = tokenizer.bos_token
    if bos and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        parts[0] = parts[0].removeprefix(bos)
    return [*parts, rest]


README = """# {name}

A model that states its budget, the tokens it will take, before it answers: `{shape}`. Trained from {base} by
sbtiny; exported from `{run}`, merged onto its {merge} base. How near these files are to the trained policy: `export.json`.

The prompt, with `<`, `>` and line breaks as they are:

{prompt}

The model goes on with its stated budget. To give one yourself, add `{prefill}` at the end; where a program takes
`chat_template_kwargs`, `{{"budget": 200}}` does that.
{ways}"""

OLLAMA = """
## ollama
    ollama create {name} -f Modelfile && ollama run {name}
A budget of your own (ollama's templates take no arguments, so the prompt is given raw):

    curl http://localhost:11434/api/generate -d {raw}

## llama.cpp
    llama-cli -m {gguf} --jinja --temp {temperature} --top-k 0 --top-p {top_p} --min-p 0
    llama-server -m {gguf} --jinja --temp {temperature} --top-k 0 --top-p {top_p} --min-p 0
    curl http://localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{{"messages": [{{"role": "user", "content": "..."}}], "chat_template_kwargs": {{"budget": 200}}}}'
"""

COMPOSE = """
llama.cpp and programs built on it do not compose letters. The model was trained on composed ones (Unicode NFC, which keyboards write):
bring other text into that form first, as Python's `unicodedata.normalize("NFC", text)` does.
"""

FOLDER = """
## transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")
    chat = [{{"role": "user", "content": "..."}}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt", budget=200)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=900)[0]))       # without budget=: a stated one

## vLLM, SGLang
    vllm serve merged            # "chat_template_kwargs": {{"budget": 200}} in the request gives a budget
    python -m sglang.launch_server --model-path merged
"""


def readme(
    about: dict[str, str], tokenizer: "PreTrainedTokenizerBase", gguf: str | None, form: Format, e: EvalSettings, composes: bool
) -> str:
    """The README. `about`: name, base, run, merge. `composes`: the tokenizer composes text (NFC), which llama.cpp does not."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], tokenize=False, add_generation_prompt=True)
    indented = "\n".join(f"    {line}" for line in prompt.splitlines())
    raw = json.dumps({"model": about["name"], "raw": True, "prompt": prompt + render_budget(200, form), "stream": False})
    ways = FOLDER.format()
    if gguf:
        sampling = {"temperature": e.temperature, "top_p": e.top_p}
        words = {key: shlex.quote(word) for key, word in {"name": about["name"], "raw": raw, "gguf": gguf}.items()}
        ways = OLLAMA.format(**words, **sampling) + (COMPOSE if composes else "") + ways
    return README.format(**about, prompt=indented, ways=ways, shape=form.shape, prefill=render_budget(200, form))


def license_line(plan: ExportConfig, base: Path) -> str:
    """The licence in the base's own card, `other` where there is none."""
    if plan.source.kind == "bundled":
        return "apache-2.0"
    card = base / "README.md"
    header = HEADER.match(card.read_text(encoding="utf-8")) if card.is_file() else None
    return header[1] if header else "other"


def model_card(plan: ExportConfig, base: Path) -> str:
    """The model card of the merged folder: origin, licence and evaluation."""
    license_ = license_line(plan, base)
    note = "" if license_ != "other" else f"\nThe licence of {plan.source.name} holds; its files do not name it.\n"
    head = ["---", f"license: {license_}", "library_name: transformers", "tags: [sbtiny, selfbudgeter]"]
    if plan.source.kind == "hub":
        head.append(f"base_model: {plan.source.ref}")
    return (
        "\n".join(head)
        + f"""
---
# {plan.name}

{plan.source.name}, trained by sbtiny to state a budget of tokens and to keep to it:
`{plan.form.shape}`. Merged onto the {plan.merge} base, saved in {plan.dtype}.
`budget` in `chat_template_kwargs` gives one.
{note}{format_eval_markdown(plan.run / "eval.json")}"""
    )


def format_eval_markdown(file: Path) -> str:
    """The run's evaluation as a list; empty if it has none."""
    if not file.is_file():
        return ""
    metrics: dict[str, Any] = runs.read_json(file)
    lines = [f"- {label}: {metrics[key]:.1%}" for key, label in SHARES if metrics.get(key) is not None]
    if within := (metrics.get("within") or {}).get("0.5"):
        lines.append(f"- length within 50 % of its budget: {within:.1%}")
    if metrics.get("mean_tokens") is not None:
        lines.append(f"- tokens: {metrics['mean_tokens']:.1f} on average")
    return f"\nOn {metrics.get('questions')} questions of {metrics.get('task')}:\n\n" + "\n".join(lines) + "\n"
