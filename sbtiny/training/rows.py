"""Labelled rows, read and put into tokens; imports no torch, so that what is wrong with them is told at once."""

from collections.abc import Callable, Sequence
from typing import Any

from sbtiny.budget.protocol import Format, parts, prefill
from sbtiny.errors import InputError
from sbtiny.tasks.sources import read_rows

Encode = Callable[[str], list[int]]  # token ids of a text, without special tokens
KEYS = ("id", "question", "response", "budget")


def read_labelled(path: str) -> list[dict[str, Any]]:
    """Rows made by `sbtiny data build`; raises InputError for a row without the keys or with a budget that is no positive whole number."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if missing := [key for key in KEYS if key not in row]:
            raise InputError(f"{path} line {number} has no {missing[0]!r}: labelled rows come from sbtiny data build")
        if not isinstance(row["budget"], int) or isinstance(row["budget"], bool) or row["budget"] < 1:
            raise InputError(f"{path} line {number}: budget {row['budget']!r} is no positive whole number")
    return rows


def tokenized(encode: Encode, row: dict[str, Any], turn_end: int, prompt: Sequence[int], form: Format) -> dict[str, list[int]]:
    """`input_ids` and `completion_mask` of a row: prompt, tags, the answer's own tokens, turn end.

    The parts are tokenised apart, so that the label is exactly the number of body tokens the model is trained to write.
    Raises InputError when the label is not that number (labelled for another tokenizer), or when the answer holds tags itself.
    """
    if (whole := len(encode(row["response"]))) != row["budget"]:
        raise InputError(
            f"row {row['id']}: budget {row['budget']} but {whole} tokens for this model's tokenizer; "
            "give the --model it was labelled for, or rebuild it with sbtiny data build"
        )
    try:
        body, after = map(encode, parts(row["response"], form))
    except ValueError as error:
        raise InputError(f"row {row['id']}: {error}: give the plain answer") from error
    written = [*encode(prefill(len(body) + len(after), form)), *body, *encode(form.closing), *after, turn_end]
    return {"input_ids": [*prompt, *written], "completion_mask": [0] * len(prompt) + [1] * len(written)}
