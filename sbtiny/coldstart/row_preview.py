"""Prints one labelled row as tokens: those that the model reads and those that it is trained to write."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from rich.console import Console
from rich.text import Text

from sbtiny.budget.protocol import FORMATS, SOLUTION, Format
from sbtiny.coldstart.rows import read_labelled, tokenize_row
from sbtiny.config import PromptSettings
from sbtiny.errors import InputError
from sbtiny.models.prompt import PLAIN, check_texts, continuation_ids, fit_template, prompt_ids

SEPARATOR = "▏"  # between tokens where underlines cannot be seen
# Control characters become visible, for a terminal would act on them; line ends are kept too.
VISIBLE = {code: 0x2400 + code for code in range(32)} | dict.fromkeys(range(0x7F, 0xA0), "�") | {10: "↵\n"}


def show_row(file: str, model_name: str, row: int, form: Format = SOLUTION, prompt: PromptSettings = PLAIN) -> None:
    """Print row `row` (from 1) in the tokens of a model; needs its tokenizer, not its weights.

    The prompt is dim, trained tokens are green, tags bold, every second token underlined. Raises InputError for a
    file, row or model that cannot be used, and for a row labelled with another tokenizer.
    """
    rows = read_labelled(file)
    if not 1 <= row <= len(rows):
        raise InputError(f"{file} has no row {row}: give --row 1 to {len(rows)}")
    from sbtiny.models.load import load_tokenizer

    chosen, tokenizer = rows[row - 1], load_tokenizer(model_name)
    fit_template(tokenizer, form, prompt)
    encode = partial(continuation_ids, tokenizer)
    check_texts(tokenizer, [chosen])
    asked = prompt_ids(tokenizer, chosen.question, chosen.system)
    example = tokenize_row(encode, chosen, tokenizer.eos_token_id, asked, form)
    ids, read = example["input_ids"], example["completion_mask"].index(1)
    pieces = [tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids]
    console = Console(soft_wrap=True, highlight=False)
    console.print(color_tokens(pieces, read, console.is_terminal))
    budget_kind = "given" if read > len(asked) else "stated"
    console.print(f"{len(asked)} prompt tokens, {len(ids) - read} trained tokens, {budget_kind} budget {example['budget']}")


def color_tokens(pieces: Sequence[str], prompt: int, underline: bool) -> Text:
    """Colour token texts; the first `prompt` are the prompt's. Without `underline`, separators mark the tokens."""
    visible = [piece.translate(VISIBLE) for piece in pieces]
    read, written = Text(style="dim"), Text(style="green")
    for i, piece in enumerate(visible):
        style = "underline" if underline and i % 2 else ""
        (read if i < prompt else written).append(piece, style)
    for form in FORMATS.values():
        written.highlight_regex(form.tag, "bold")
    whole = Text.assemble(read, written)
    return whole if underline else Text(SEPARATOR, "dim").join(whole.divide(list(accumulate(map(len, visible)))[:-1]))
