"""Read one field of a row: the key it stands under, and its value as text or as a flag."""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from sbtiny.errors import InputError
from sbtiny.tasks.row_files import Row

# Our key -> keys of others; the first with a value counts.
KEYS = {
    "question": ("question", "problem", "instruction", "prompt"),
    "response": ("response", "solution", "generated_solution", "output", "completion"),
    "answer": ("answer", "expected_answer", "final_answer", "ground_truth"),
    "turns": ("messages", "conversations", "conversation"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "thoughts": ("reasoning_content", "reasoning", "thinking"),
}
SHOWN = 12  # keys in a message


def find_key(row: Row, what: str) -> str | None:
    """Find the row's key for ours; None where it has none."""
    return next((key for key in KEYS[what] if row.get(key) is not None), None)


def read_text(row: Row, key: str, where: str) -> str:
    """Read a text, or a finite number as text. Raises InputError for a missing key or an empty value."""
    if key not in row:
        keys = ", ".join([*(repr(name)[:40] for name in list(row)[:SHOWN]), *["..."] * (len(row) > SHOWN)]) or "none"
        also = f", or {', '.join([*KEYS[key][1:], *(KEYS['turns'] if key == 'question' else ())])}" if key in KEYS else ""
        raise InputError(f"{where} has no {key!r}{suggestion(key, row)}: rename or add it{also} (keys found: {keys})")
    value = row[key]
    if is_number(value) and value - value == 0:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise wrong_value(row, key, where, "text that is not empty")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where}: {key!r} has a lone surrogate (\\ud800 to \\udfff), which is no text: remove it")
    return value.strip()


def read_flag(row: Row, key: str, where: str) -> bool | None:
    value = row.get(key)
    if isinstance(value, str) and value.lower() in ("true", "false"):  # CSV has only text
        return value.lower() == "true"
    if value is not None and not isinstance(value, bool):
        raise wrong_value(row, key, where, "true, false or null")
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def wrong_value(row: Row, key: str, where: str, wanted: str) -> InputError:
    return InputError(f"{where}: {key!r} is {preview_value(row[key])}: it must be {wanted}")


def preview_value(value: Any) -> str:
    """Write the beginning of a value for a message, also of a Parquet value that JSON cannot hold."""
    return json.dumps(value, default=repr)[:40]


def suggestion(name: str, known: Iterable[str]) -> str:
    by_lower = {key.lower(): key for key in known}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
