"""Read the rows of a file: JSON Lines, a JSON list, CSV or Parquet, the first three also as .gz."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sbtiny.errors import InputError

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]
LONGEST_FIELD = 1 << 30  # bytes of a CSV field; the csv module's 128 KiB is less than a long answer


def read_file(file: Path) -> list[tuple[int, Row]]:
    """Read (number, row) of each object; see `format_row_location`. Raises InputError with the place of the fault."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix.lower() == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file} is no whole gzip file ({error}): fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    return list(KINDS.get(file_format(file.name), read_lines)(content.removeprefix(b"\xef\xbb\xbf"), file))


def file_format(name: str) -> str:
    """Return the suffix that names the file's format; `.gz` is skipped."""
    return Path(name.lower().removesuffix(".gz")).suffix


def format_row_location(path: str, number: int) -> str:
    """Write the place of a row: the line of a text file, the row of any other."""
    counted = "row" if file_format(re.sub("#[0-9]+$", "", path)) in KINDS else "line"
    return f"{path}, {counted} {number}"


def read_lines(content: bytes, file: Path) -> Numbered:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield number, require_object(parse(line, where), where)


def read_json(content: bytes, file: Path) -> Numbered:
    """Read a list of objects. Anything else is read as JSON Lines, which also come with this suffix."""
    if not content.lstrip().startswith(b"["):
        yield from read_lines(content, file)
        return
    for number, row in enumerate(parse(content, str(file)), 1):
        yield number, require_object(row, f"{file}, row {number}")


def read_csv(content: bytes, file: Path) -> Numbered:
    """Read rows with the first line as keys. An empty field is left out."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(decode(content, str(file)), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row:
                raise InputError(f"{file}, row {number}: more fields than the first line names: quote a field with commas")
            yield number, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise InputError(f"{file}, after line {reader.line_num}: broken CSV ({error}): write it again, or as JSON Lines") from error


def read_parquet(content: bytes, file: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{file} is no readable Parquet file ({reason}): fetch or write it again") from error
    yield from enumerate(rows, 1)


KINDS: dict[str, Callable[[bytes, Path], Numbered]] = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
ENDINGS = (".jsonl", *KINDS, ".gz")


def parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(decode(content, where))
    except json.JSONDecodeError as error:
        line_number = f", line {error.lineno}" if error.lineno > 1 else ""  # in a file that is one document
        reason = f"broken JSON ({error.msg}): write one whole object a line"
        raise InputError(f"{where}{line_number}, column {error.colno}: {reason}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise InputError(f"{where}: unusable JSON: {error}") from error


def decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}, byte {error.start + 1}: not UTF-8 text: save the file as UTF-8") from error


def require_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not an object: write one JSON object a line, in no list")
    return row
