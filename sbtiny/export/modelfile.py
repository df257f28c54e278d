"""The files beside a GGUF that make it usable: ollama's Modelfile, and a README with the exact lines for each program."""

import json
import shlex
from typing import TYPE_CHECKING

from sbtiny.budget.protocol import Format, prefill
from sbtiny.config import EvalSettings
from sbtiny.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ANSWER, AGAIN = (f"\x00{name}\x00" for name in ("system", "user", "answer", "again"))


def modelfile(gguf: str, tokenizer: "PreTrainedTokenizerBase", stops: list[int], e: EvalSettings, context: int) -> str:
    """FROM, TEMPLATE in Go's language, the stops and the sampling of evaluation."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go_template(tokenizer)}"""']
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(i)}"' for i in stops]
    lines += [f"PARAMETER temperature {e.temperature}", f"PARAMETER top_p {e.top_p}", "PARAMETER top_k 0", "PARAMETER min_p 0"]
    lines += ["PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {min(context, 8192)}"]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template as ollama's: told by what the Jinja one puts around marked messages, so that both give the same text.

    Turns of user and assistant alternate, a system message comes first. Raises InputError for a template that changes messages.
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
    """The text before a system message and between it and the user's; None for templates that know no system messages."""
    from jinja2 import TemplateError

    try:
        first, then, _ = _around(tokenizer, [("system", SYSTEM), ("user", USER)])
    except (TemplateError, InputError):
        return None, None
    return first, then


def _around(tokenizer: "PreTrainedTokenizerBase", turns: list[tuple[str, str]]) -> list[str]:
    """The text before, between and after the turns of a chat; a start token that is added anyway is left out."""
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

A model that says how many tokens it will think before it answers: `{shape}`. Trained from {base} by
sbtiny; exported from `{run}`, merged onto its {merge} base. How near these files are to the trained policy: `export.json`.

The prompt, with `<`, `>` and line breaks as they are:

{prompt}

The model goes on with its own number. To set it yourself, add `{said}` at the end; where a program takes
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
llama.cpp and what is built on it read letters as they are written, where the model was trained on composed ones (Unicode NFC, which
keyboards write): bring other text into that form first, as Python's `unicodedata.normalize("NFC", text)` does.
"""

FOLDER = """
## transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")
    chat = [{{"role": "user", "content": "..."}}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt", budget=200)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=900)[0]))       # without budget=: the model's own number

## vLLM, SGLang
    vllm serve merged            # "chat_template_kwargs": {{"budget": 200}} in the request sets the number
    python -m sglang.launch_server --model-path merged
"""


def readme(
    about: dict[str, str], tokenizer: "PreTrainedTokenizerBase", gguf: str | None, form: Format, e: EvalSettings, composes: bool
) -> str:
    """`about`: name, base, run, merge; `composes`: the tokenizer brings text into composed form, which llama.cpp does not."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], tokenize=False, add_generation_prompt=True)
    shown = "\n".join(f"    {line}" for line in prompt.splitlines())
    raw = json.dumps({"model": about["name"], "raw": True, "prompt": prompt + prefill(200, form), "stream": False})
    ways = FOLDER.format()
    if gguf:
        sampling = {"temperature": e.temperature, "top_p": e.top_p}
        words = {key: shlex.quote(word) for key, word in {"name": about["name"], "raw": raw, "gguf": gguf}.items()}
        ways = OLLAMA.format(**words, **sampling) + (COMPOSE if composes else "") + ways
    return README.format(**about, prompt=shown, ways=ways, shape=form.shape, said=prefill(200, form))
