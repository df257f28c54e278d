"""Reads labelled rows and tokenizes them. Imports no torch, so that faults are reported at once."""

from collections.abc import Callable, Sequence
from typing import Any

from sbtiny.budget.protocol import Format, render_budget, split_response
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.fields import preview_value, read_text, wrong_value
from sbtiny.tasks.row_files import format_row_location
from sbtiny.tasks.sources import numbered_rows

Encode = Callable[[str], list[int]]  # token ids of a text, without special tokens
KEYS = ("id", "question", "response", "budget")


class LabelledRow(dict[str, Any]):
    """A labelled row that knows the file and line it was read from."""

    def __init__(self, row: dict[str, Any], where: str) -> None:
        super().__init__(row)
        self.where = self.location = where

    @property
    def question(self) -> str:
        return self["question"]

    @property
    def system(self) -> str | None:
        return self.get("system")

    @property
    def response(self) -> str | None:
        """The answer; None in a row that teaches a budget alone."""
        return self["response"]


def row_location(row: dict[str, Any]) -> str:
    """File and line of a row, for messages; the id of a row that was not read from a file."""
    return row.where if isinstance(row, LabelledRow) else f"row {row['id']}"


def read_labelled(path: str) -> list[LabelledRow]:
    """Rows made by `sbtiny data build`. Raises InputError with file and line for a row that cannot be trained on."""
    return [validate_row(row, format_row_location(path, number)) for number, row in numbered_rows(path)]


def validate_row(row: dict[str, Any], where: str) -> LabelledRow:
    if missing := [key for key in KEYS if key not in row]:
        raise InputError(f"{where} has no {missing[0]!r}: labelled rows come from sbtiny data build (--traces labels a file)")
    absent = {"response": row["response"] is None, "system": row.get("system") in (None, "")}
    for key in ("question", "response", "system"):
        if absent.get(key):
            continue
        if not isinstance(row[key], str):
            raise wrong_value(row, key, where, "text")
        read_text(row, key, where)
    budget = row["budget"]
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise InputError(f"{where}: budget {preview_value(budget)} is no positive whole number: rebuild the file with sbtiny data build")
    if not isinstance(row.get("given", False), bool):
        raise wrong_value(row, "given", where, "true or false")
    if row.get("given") and row["response"] is None:
        raise InputError(f"{where} has a given budget and no response: nothing in it would be trained")
    return LabelledRow(row | {"id": read_text(row, "id", where)}, where)


def warn_of_other_prompt(rows: Sequence[dict[str, Any]], asked_with: dict[str, str | None]) -> None:
    """Print one line where rows were sampled with another instruction or system turn; those of traces do not say."""
    others = [row for row in rows if row.get("asked_with", asked_with) != asked_with]
    if others:
        place, sampled = row_location(others[0]), others[0]["asked_with"]
        what = f"{len(others)} of {len(rows)} rows were sampled with another prompt than they are trained with"
        line = f"{what} ({place}: {sampled}, here {asked_with}): set prompt.instruction and prompt.system alike for data build and sft"
        console.print(line, markup=False, soft_wrap=True, style="yellow")


def tokenize_row(encode: Encode, row: dict[str, Any], turn_end: int, prompt: Sequence[int], form: Format) -> dict[str, Any]:
    """Tokenize a row: prompt, budget tag, body, closing tag, turn end, as `input_ids` and `completion_mask`.

    `body_at` is the index of the first body token. `budget` is the stated one: less than the row's if the answer's own `<think>` tags
    become the format's. A row with `given` has its budget masked: it is read, as a user's, and not learnt.
    A row whose response is None ends behind its budget, which alone is learnt.
    The parts are tokenized separately, so that the budget is exactly the number of body tokens.
    Raises InputError if the row's budget is not its token count (labelled for another tokenizer) or if the answer holds tags.
    """
    if row["response"] is None:
        opening = encode(render_budget(row["budget"], form))
        mask = [0] * len(prompt) + [1] * len(opening)
        return {"input_ids": [*prompt, *opening], "completion_mask": mask, "body_at": len(mask), "budget": row["budget"]}
    if (tokens := len(encode(row["response"]))) != row["budget"]:
        raise InputError(
            f"{row_location(row)}: budget {row['budget']} but {tokens} tokens for this model's tokenizer; "
            "give the --model it was labelled for, or rebuild it with sbtiny data build"
        )
    try:
        body, after = map(encode, split_response(row["response"], form))
    except ValueError as error:
        raise InputError(f"{row_location(row)}: {error}: give the plain answer") from error
    budget = len(body) + len(after)
    opening = encode(render_budget(budget, form))
    written = [*opening, *body, *encode(form.closing), *after, turn_end]
    body_at = len(prompt) + len(opening)
    read = body_at if row.get("given") else len(prompt)
    mask = [0] * read + [1] * (len(prompt) + len(written) - read)
    return {"input_ids": [*prompt, *written], "completion_mask": mask, "body_at": body_at, "budget": budget}
