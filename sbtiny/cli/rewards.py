"""Rewards of the samples in a file, part by part, for `sbtiny reward FILE`."""

import math
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sbtiny.budget.reward import compute_reward
from sbtiny.errors import InputError
from sbtiny.tasks.fields import is_number, wrong_value
from sbtiny.tasks.row_files import Row, format_row_location
from sbtiny.tasks.sources import numbered_rows

MAX_TOKENS = 10**9  # tokens; far above anything real, far below what overflows
REWARD_INPUTS = ("budget", "length", "correct", "b_max", "inside")
REWARD_PARTS = ("format", "budget_penalty", "adherence", "total")


def reward_rows(file: str, alpha: float) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, each with its reward: total, format, budget_penalty, adherence, inside.

    A row has `budget` (tokens, null for a malformed answer), `length` (tokens), `correct` (true or false) and perhaps
    `b_max` (tokens; null or absent is infinity). Raises InputError with the line of what is wrong.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"--alpha {alpha}: give a width above 0, such as 6.0 (start of training) or 0.1 (its end)")
    return [
        row | asdict(compute_reward(**parse_reward_row(row, format_row_location(file, n)), alpha=alpha)) for n, row in numbered_rows(file)
    ]


def parse_reward_row(row: Row, where: str) -> dict[str, Any]:
    """The arguments of `compute_reward` from a row. A missing budget must be written as null: a forgotten one would cost -1."""
    if missing := [key for key in ("budget", "correct", "length") if key not in row]:
        raise InputError(f"{where} has no {missing[0]!r}: each row needs budget, length and correct")
    malformed, b_max = row["budget"] is None, row.get("b_max")
    budget = None if malformed else read_tokens(row, "budget", where, 1, ", or null for a malformed answer")
    if b_max is not None and not (is_number(b_max) and b_max > 0):
        raise wrong_value(row, "b_max", where, "a number of tokens above 0, or null for none")
    if not isinstance(row["correct"], bool):
        raise wrong_value(row, "correct", where, "true or false")
    length = read_tokens(row, "length", where, 0)
    return {"budget": budget, "length": length, "correct": row["correct"], "b_max": math.inf if b_max is None else b_max}


def read_tokens(row: Row, key: str, where: str, least: int, other: str = "") -> int:
    """Read a count of tokens, `least` to MAX_TOKENS."""
    if not is_number(row[key]) or not isinstance(row[key], int) or not least <= row[key] <= MAX_TOKENS:
        raise wrong_value(row, key, where, f"a whole number of tokens from {least} to {MAX_TOKENS:,}{other}")
    return row[key]


def reward_table(rows: list[dict[str, Any]]) -> Table:
    """A line per row with its inputs, reward parts and total; the last line has the means."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_footer=len(rows) > 1, footer_style="dim")
    for name in REWARD_INPUTS:
        table.add_column(name, justify="right", footer="mean" if name == "budget" else "")
    for part in REWARD_PARTS:
        mean = sum(row[part] for row in rows) / len(rows) if rows else 0.0
        table.add_column(part.replace("_", " "), justify="right", footer=f"{mean:.4f}")
    for row in rows:
        inputs = (row.get(name) for name in REWARD_INPUTS)
        table.add_row(*map(format_input, inputs), *(f"{row[part]:.4f}" for part in REWARD_PARTS))
    return table


def format_input(value: float | bool | None) -> str:
    return "–" if value is None else f"{value:,}" if is_number(value) else "yes" if value else "no"
