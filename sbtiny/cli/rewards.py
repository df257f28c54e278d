"""Rewards of the samples in a file, part by part, for `sbtiny reward FILE`."""

import json
import math
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sbtiny.budget.reward import compute_reward
from sbtiny.errors import InputError
from sbtiny.tasks.row_files import locate
from sbtiny.tasks.sources import numbered_rows

MAX_TOKENS = 10**9  # tokens; far above anything real, far below what overflows
REWARD_PARTS = ("format", "budget_penalty", "adherence", "total")


def reward_rows(file: str, alpha: float) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, each with its reward: total, format, budget_penalty, adherence, inside.

    A row has `budget` (tokens, null for a malformed answer), `length` (tokens), `correct` (true or false) and perhaps
    `b_max` (tokens; null or absent is infinity). Raises InputError with the line of what is wrong.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"--alpha {alpha}: give a width above 0, such as 6.0 (start of training) or 0.1 (its end)")
    return [row | asdict(compute_reward(**parse_reward_row(row, locate(file, n)), alpha=alpha)) for n, row in numbered_rows(file)]


def parse_reward_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of `compute_reward` from a row. A missing budget must be written as null: a forgotten one would cost -1."""
    budget = parse_whole_number(row, "budget", where, least=1, optional=True)
    b_max = row.get("b_max")
    if b_max is not None and (not is_number(b_max) or not b_max > 0):
        raise InputError(f"{where}: 'b_max' is {format_json(b_max)}: it must be a number of tokens above 0, or null for none")
    correct = require_key(row, "correct", where)
    if not isinstance(correct, bool):
        raise InputError(f"{where}: 'correct' is {format_json(correct)}: it must be true or false")
    length = parse_whole_number(row, "length", where, least=0)
    return {"budget": budget, "length": length, "correct": correct, "b_max": math.inf if b_max is None else b_max}


def parse_whole_number(row: dict[str, Any], key: str, where: str, least: int, optional: bool = False) -> int | None:
    """The whole number of tokens under a key, `least` to MAX_TOKENS; None for null if `optional`."""
    value = require_key(row, key, where)
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_TOKENS:
        wanted = f"a whole number of tokens from {least} to {MAX_TOKENS:,}"
        other = ", or null for a malformed answer" if optional else ""
        raise InputError(f"{where}: {key!r} is {format_json(value)}: it must be {wanted}{other}")
    return value


def require_key(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise InputError(f"{where} has no {key!r}: each row needs budget, length and correct")
    return row[key]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_json(value: Any) -> str:
    return json.dumps(value)[:40]


def reward_table(rows: list[dict[str, Any]]) -> Table:
    """A line per row with its inputs, reward parts and total; the last line has the means."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_footer=len(rows) > 1, footer_style="dim")
    for name in ("budget", "length", "correct", "b_max", "inside"):
        table.add_column(name, justify="right", footer="mean" if name == "budget" else "")
    for part in REWARD_PARTS:
        mean = sum(row[part] for row in rows) / len(rows) if rows else 0.0
        table.add_column(part.replace("_", " "), justify="right", footer=f"{mean:.4f}")
    for row in rows:
        inputs = [
            format_optional(row["budget"]),
            format_optional(row["length"]),
            format_bool(row["correct"]),
            format_optional(row.get("b_max")),
        ]
        table.add_row(*inputs, format_bool(row["inside"]), *(f"{row[part]:.4f}" for part in REWARD_PARTS))
    return table


def format_optional(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def format_bool(value: bool) -> str:
    return "yes" if value else "no"
