"""Answer lengths for a bench, drawn or read from a file, and statistics of its measurements."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbtiny.errors import InputError
from sbtiny.load_settings import read_utf8

GUESS_LOG_ERROR = 0.3  # standard deviation of the log of (guess / length): about the error of a stated budget
MIN_LONGEST_OVER_MEAN = 3.0  # below it there is no tail to measure
LENGTH_LOG_STD = 0.9  # of a length's logarithm


def draw_lengths(count: int, mean: int, longest: int, seed: int) -> list[int]:
    """Log-normal answer lengths in tokens, at most `longest`, one of them exactly that; their mean is close to `mean`.

    Raises InputError if `longest` is below 3.3 times `mean`, or `count` too small: without a tail there is nothing to measure.
    """
    if longest < MIN_LONGEST_OVER_MEAN * mean * 1.1 or mean < 2:
        raise InputError(f"--max-tokens {longest} is no heavy tail over a mean of {mean}: give at least {4 * mean}")
    if longest * count < MIN_LONGEST_OVER_MEAN * (longest + 2 * (count - 1)):  # all others at their least
        raise InputError(f"{count} answers of at most {longest} tokens have no heavy tail: ask for more")
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(mean) - LENGTH_LOG_STD**2 / 2, LENGTH_LOG_STD, count))
    lengths = np.clip(np.round(lengths), 2, longest).astype(int)
    lengths[rng.integers(count)] = longest
    while longest < MIN_LONGEST_OVER_MEAN * lengths.mean():
        lengths = np.maximum(2, lengths * 9 // 10)
        lengths[lengths.argmax()] = longest
    return lengths.tolist()


def guess_lengths(lengths: Sequence[int], seed: int) -> list[int]:
    """Noisy guesses of the lengths for our engine, about as good as stated budgets."""
    errors = np.exp(np.random.default_rng(seed).normal(0, GUESS_LOG_ERROR, len(lengths)))
    return [max(1, round(guess)) for guess in (errors * lengths).tolist()]


def read_lengths(file: Path, count: int | None = None) -> list[int]:
    """The first `count` answer lengths of a file, or all: one number a line, or JSONL rows with `length`. Raises InputError."""
    if not file.is_file():
        raise InputError(f"no file {file}: check the path given to --lengths")
    lengths = []
    for number, line in enumerate(read_utf8(file).split("\n"), 1):
        if line.strip():
            lengths.append(parse_length(line, f"{file} line {number}"))
    if len(lengths) < (count or 2):
        raise InputError(f"{file} holds {len(lengths)} lengths, {count or 2} are needed: {'lower --requests' if count else 'give more'}")
    return lengths[:count]


def parse_length(line: str, where: str) -> int:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: {line.strip()[:40]!r} is no number: write one length a line") from error
    value = value.get("length") if isinstance(value, dict) else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: a length is {value!r}: write a whole number from 1")
    return value


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def record_ratio(name: str, mine: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median and range of the ratios by round: both sides of a round ran under the same machine load."""
    ratio = summarize([a / b for a, b in zip(mine, theirs, strict=True)])
    return {name: ratio["median"], f"{name}_range": [ratio["low"], ratio["high"]]}


def record_lengths(lengths: Sequence[int]) -> dict[str, float]:
    return {"mean_length": sum(lengths) / len(lengths), "longest": max(lengths)}
