"""One labelled row as the model meets it: what it reads, what it is trained to write, and where the tokens part."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from rich.console import Console
from rich.text import Text

from sbtiny.budget.protocol import FORMATS, SOLUTION, Format
from sbtiny.errors import InputError
from sbtiny.coldstart.rows import read_labelled, tokenized

SEPARATOR = "▏"  # between tokens where underlines cannot be seen
# Line ends are shown and kept; other control characters are shown, for a terminal would act on them.
VISIBLE = {code: 0x2400 + code for code in range(32)} | dict.fromkeys(range(0x7F, 0xA0), "�") | {10: "↵\n"}


def show_row(file: str, model_name: str, row: int, form: Format = SOLUTION) -> None:
    """Print the row of that number (from 1) in the tokens of a model; needs its tokenizer, not its weights.

    The prompt is dimmed, trained tokens are green, tags bold, every other token underlined. Raises InputError for a
    file, row or model that cannot be used and for a row labelled with another tokenizer.
    """
    rows = read_labelled(file)
    if not 1 <= row <= len(rows):
        raise InputError(f"{file} has no row {row}: give --row 1 to {len(rows)}")
    from sbtiny.models.load import load_tokenizer
    from sbtiny.models.prompt import check_texts, fit_template, inner_ids, prompt_ids

    chosen, tokenizer = rows[row - 1], load_tokenizer(model_name)
    fit_template(tokenizer, form)
    encode = partial(inner_ids, tokenizer)
    check_texts(tokenizer, [chosen])
    prompt = prompt_ids(tokenizer, chosen.question, chosen.system)
    example = tokenized(encode, chosen, tokenizer.eos_token_id, prompt, form)
    ids, read = example["input_ids"], example["completion_mask"].index(1)
    pieces = [tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids]
    console = Console(soft_wrap=True, highlight=False)
    console.print(painted(pieces, read, console.is_terminal))
    whose = "given" if read > len(prompt) else "stated"
    console.print(f"{len(prompt)} prompt tokens, {len(ids) - read} trained tokens, {whose} budget {example['budget']}")


def painted(pieces: Sequence[str], prompt: int, underline: bool) -> Text:
    """Token texts, of which the first `prompt` are the prompt's; parted by underlines or, without, by separators."""
    shown = [piece.translate(VISIBLE) for piece in pieces]
    read, written = Text(style="dim"), Text(style="green")
    for number, piece in enumerate(shown):
        style = "underline" if underline and number % 2 else ""
        (read if number < prompt else written).append(piece, style)
    for form in FORMATS.values():
        written.highlight_regex(form.tag, "bold")
    whole = Text.assemble(read, written)
    return whole if underline else Text(SEPARATOR, "dim").join(whole.divide(list(accumulate(map(len, shown)))[:-1]))
