"""Labelled rows, read and put into tokens; imports no torch, so that what is wrong with them is told at once."""

from collections.abc import Callable, Sequence
from typing import Any

from sbtiny.budget.protocol import Format, parts, prefill
from sbtiny.errors import InputError
from sbtiny.tasks.row_files import locate
from sbtiny.tasks.row_shapes import shown, text
from sbtiny.tasks.sources import numbered_rows

Encode = Callable[[str], list[int]]  # token ids of a text, without special tokens
KEYS = ("id", "question", "response", "budget")


class Labelled(dict[str, Any]):
    """A labelled row that knows the file and line it was read from."""

    def __init__(self, row: dict[str, Any], where: str) -> None:
        super().__init__(row)
        self.where = where

    @property
    def question(self) -> str:
        return self["question"]

    @property
    def system(self) -> str | None:
        return self.get("system")

    @property
    def response(self) -> str:
        return self["response"]

    @property
    def named(self) -> str:
        return self.where


def place(row: dict[str, Any]) -> str:
    """Where a row stands, for what is told of it; of one that was just made, whose it is."""
    return row.where if isinstance(row, Labelled) else f"row {row['id']}"


def read_labelled(path: str) -> list[Labelled]:
    """Rows made by `sbtiny data build`. Raises InputError with file and line for a row that cannot be trained on."""
    return [checked(row, locate(path, number)) for number, row in numbered_rows(path)]


def checked(row: dict[str, Any], where: str) -> Labelled:
    if missing := [key for key in KEYS if key not in row]:
        raise InputError(f"{where} has no {missing[0]!r}: labelled rows come from sbtiny data build (--traces labels a file)")
    for key in ("question", "response"):
        if not isinstance(row[key], str):
            raise InputError(f"{where}: {key!r} is {shown(row[key])}: it must be text")
        text(row, key, where)
    if row.get("system") not in (None, ""):
        text(row, "system", where)
    budget = row["budget"]
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise InputError(f"{where}: budget {shown(budget)} is no positive whole number: rebuild the file with sbtiny data build")
    if not isinstance(row.get("given", False), bool):
        raise InputError(f"{where}: 'given' is {shown(row['given'])}: it must be true or false")
    return Labelled(row | {"id": text(row, "id", where)}, where)


def tokenized(encode: Encode, row: dict[str, Any], turn_end: int, prompt: Sequence[int], form: Format) -> dict[str, Any]:
    """`input_ids` and `completion_mask` of a row: prompt, tags, the answer's own tokens, turn end; `body_at` is the first of the answer's.
    `budget` is the number that is stated: less than the row's where the answer's own `<think>` tags become the format's.

    The budget of a row with `given` is read, as a user's is, and not learnt to be stated: its tokens are masked.
    The parts are tokenised apart, so that the label is exactly the number of body tokens the model is trained to write.
    Raises InputError when the label is not that number (labelled for another tokenizer), or when the answer holds tags itself.
    """
    if (whole := len(encode(row["response"]))) != row["budget"]:
        raise InputError(
            f"{place(row)}: budget {row['budget']} but {whole} tokens for this model's tokenizer; "
            "give the --model it was labelled for, or rebuild it with sbtiny data build"
        )
    try:
        body, after = map(encode, parts(row["response"], form))
    except ValueError as error:
        raise InputError(f"{place(row)}: {error}: give the plain answer") from error
    budget = len(body) + len(after)
    opening = encode(prefill(budget, form))
    written = [*opening, *body, *encode(form.closing), *after, turn_end]
    body_at = len(prompt) + len(opening)
    read = body_at if row.get("given") else len(prompt)
    mask = [0] * read + [1] * (len(prompt) + len(written) - read)
    return {"input_ids": [*prompt, *written], "completion_mask": mask, "body_at": body_at, "budget": budget}
