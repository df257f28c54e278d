"""Decide from its metrics whether a file is still the trained policy; list the reasons if not. Imports no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbtiny.budget.metrics import Sample, is_within, summarise
from sbtiny.export.strings import STRINGS

# Least share of confident positions (compare.CONFIDENT_MARGIN) at which first choices agree.
MIN_AGREEMENT = {"f32": 0.999, "f16": 0.999, "bf16": 0.99, "q8_0": 0.99, "q6_k": 0.98}
MIN_AGREEMENT_LOW_BITS = 0.9  # for 4 and 5 bits
RATE_SLACK = 0.05  # allowed drop of the format and stop rates, and of `within` below 8 bits
WITHIN_SLACK = 0.02  # allowed drop of `within` with 8 bits and more
WITHIN = 0.5  # of the budget
EVAL_KEYS = ("accuracy", "mean_tokens", "mean_budget", "format_rate", "within")


@dataclass(frozen=True, slots=True)
class ExportEval:
    """Metrics of the answers. `figures`: as in export.json. `each`: name of a rate -> whether each question counts."""

    figures: dict[str, Any]
    each: dict[str, list[bool]]


def evaluate_policy(samples: Sequence[Sample], ended: list[bool]) -> ExportEval:
    whole = summarise(samples)
    each = {"within": [is_within(s, WITHIN) for s in samples], "format_rate": [s.ok for s in samples], "ended": ended}
    return ExportEval({key: whole[key] for key in EVAL_KEYS} | {"ended": sum(ended) / len(ended)}, each)


def rate_drops(trained: ExportEval, file: ExportEval, kind: str) -> dict[str, dict[str, float]]:
    """Name of a rate -> how much it `fell` from the trained policy to the file, and the drop that is `allowed`."""
    drops = {}
    for name, before in trained.each.items():
        slack = WITHIN_SLACK if name == "within" and MIN_AGREEMENT.get(kind, 0) >= MIN_AGREEMENT["q8_0"] else RATE_SLACK
        fell, noise = paired_drop(before, file.each[name])
        drops[name] = {"fell": fell, "allowed": min(1.0, slack + noise)}
    return drops


def paired_drop(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Mean of before - after over the same questions, and two standard errors of it; 1.0 for a single question.

    Rounding can flip one sampled token and so change the rest of an answer, although the seeds are the same. The errors measure this
    noise: 1.3 points if 1 of 50 in 500 questions differs, none if all agree.
    """
    drops = np.asarray(before, float) - np.asarray(after, float)
    noise = 2 * float(drops.std(ddof=1)) / math.sqrt(len(drops)) if len(drops) > 1 else 1.0
    return float(drops.mean()), noise


def find_failures(kind: str, found: dict[str, Any], prompts: int, chats_ending: float) -> Iterator[str]:
    """Yield the reasons why a file is not the trained policy in one reader.

    `found`: the reader's metrics. `prompts`: how many were compared. `chats_ending`: least number of chats that must stop.
    """
    least = MIN_AGREEMENT.get(kind, MIN_AGREEMENT_LOW_BITS)
    if found["clear_agreement"] < least:
        yield f"first choices agree at {found['clear_agreement']:.2%} of the positions where they are clear, {least:.1%} is the least"
    for name, count in ("strings", len(STRINGS)), ("prompts", prompts):
        if (wrong := count - found[f"{name}_same"]) > 0:
            yield f"{wrong} of {count} {name} become other tokens"
    if "chats" in found and found["chats_ended"] < chats_ending:
        yield f"{found['chats'] - found['chats_ended']} of {found['chats']} chats did not stop"
    for name, share in found.get("falls", {}).items():
        if share["fell"] > share["allowed"]:
            yield f"{name} fell by {share['fell']:.3f}, {share['allowed']:.3f} is the most"
