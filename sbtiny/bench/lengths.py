"""The work of a bench: how many tokens each answer takes, drawn or read, and the statistics of what was measured."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sbtiny.errors import InputError

BLIND = 0.3  # how far off, in the logarithm, our engine's guess of a length is: about what a stated budget is worth
TAIL = 3.0  # the longest answer is at least so many times the mean
SPREAD = 0.9  # of the logarithm


def draw_lengths(count: int, mean: int, longest: int, seed: int) -> list[int]:
    """Log-normal answer lengths in tokens, at most `longest`, one of them exactly that; their mean is close to `mean`.

    Raises InputError when the longest is not at least 3 times the mean: without a tail there is nothing to measure.
    """
    if longest < TAIL * mean * 1.1 or mean < 2:
        raise InputError(f"--max-tokens {longest} is no heavy tail over a mean of {mean}: give at least {4 * mean}")
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(mean) - SPREAD**2 / 2, SPREAD, count))
    lengths = np.clip(np.round(lengths), 2, longest).astype(int)
    lengths[rng.integers(count)] = longest
    while longest < TAIL * lengths.mean():
        lengths = np.maximum(2, lengths * 9 // 10)
        lengths[lengths.argmax()] = longest
    return lengths.tolist()


def guesses(lengths: Sequence[int], seed: int) -> list[int]:
    """What our engine is told of the lengths, beforehand: as much as a budget would say, not the lengths themselves."""
    errors = np.exp(np.random.default_rng(seed).normal(0, BLIND, len(lengths)))
    return [max(1, round(guess)) for guess in (errors * lengths).tolist()]


def read_lengths(file: Path, count: int) -> list[int]:
    """The first `count` answer lengths of a file: one number a line, or JSONL rows with `length`. Raises InputError."""
    if not file.is_file():
        raise InputError(f"no file {file}: check the path given to --lengths")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            found.append(read_length(line, f"{file} line {number}"))
    if len(found) < count:
        raise InputError(f"{file} holds {len(found)} lengths, {count} are needed: lower --requests")
    return found[:count]


def read_length(line: str, where: str) -> int:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: {line.strip()[:40]!r} is no number: write one length a line") from error
    value = value.get("length") if isinstance(value, dict) else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: a length is {value!r}: write a whole number from 1")
    return value


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and range of the ratios, round by round: both of a round met the same neighbours on the machine."""
    return spread([a / b for a, b in zip(mine, theirs, strict=True)])
