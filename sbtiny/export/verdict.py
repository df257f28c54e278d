"""When a file is the trained policy: what its measured figures must be, and the reasons of one that must not be used. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbtiny.budget.metrics import Sample, kept, summarise
from sbtiny.export.strings import STRINGS

# Least share of clear positions (compare.LEAD) at which first choices must agree: what is left of the trained policy's decisions.
AGREE = {"f32": 0.999, "f16": 0.999, "bf16": 0.99, "q8_0": 0.99, "q6_k": 0.98}
AGREE_LOW = 0.9  # for 4 and 5 bits
SLACK = 0.05  # what format and stopping may lose to quantisation, and kept budgets to fewer than 8 bits
NEAR = 0.02  # of budgets kept within 50 %, with 8 bits and more
WITHIN = 0.5
FIGURES = ("accuracy", "mean_tokens", "mean_budget", "format_rate", "within")


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to the questions of the check: `figures` as export.json has them; `each` a share's name -> whether each question counts."""

    figures: dict[str, Any]
    each: dict[str, list[bool]]


def asked(samples: Sequence[Sample], ended: list[bool]) -> Asked:
    whole = summarise(samples)
    each = {"within": [kept(s, WITHIN) for s in samples], "format_rate": [s.ok for s in samples], "ended": ended}
    return Asked({key: whole[key] for key in FIGURES} | {"ended": sum(ended) / len(ended)}, each)


def falls(trained: Asked, file: Asked, kind: str) -> dict[str, dict[str, float]]:
    """Share -> by how much it `fell` from the trained policy to a file of it, and how much is `allowed`."""
    found = {}
    for name, before in trained.each.items():
        slack = NEAR if name == "within" and AGREE.get(kind, 0) >= AGREE["q8_0"] else SLACK
        fell, noise = difference(before, file.each[name])
        found[name] = {"fell": fell, "allowed": min(1.0, slack + noise)}
    return found


def difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """The mean of before - after over the same questions, and two standard errors of it.

    The seeds are the same, yet one draw that rounding turns changes the rest of an answer: of n questions, those that differ come out
    either way. Two points mean something for hundreds of questions; one of ten is ten points. With 500, of which 1 in 50 differs, it
    adds 1.3 points; where all agree, nothing. A single question proves nothing.
    """
    apart = np.asarray(before, float) - np.asarray(after, float)
    noise = 2 * float(apart.std(ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else 1.0
    return float(apart.mean()), noise


def reasons(kind: str, found: dict[str, Any], prompts: int, chats_ending: float) -> list[str]:
    """Why a file is not the trained policy in one reader, whose figures are `found`; none when it is.

    `prompts` were compared; `chats_ending` is how many of its chats can be expected to end, as often as the trained policy does.
    """
    return [*_first_choices(kind, found), *_tokens(found, prompts), *_stops(found, chats_ending), *_shares(found)]


def _first_choices(kind: str, found: dict[str, Any]) -> list[str]:
    least = AGREE.get(kind, AGREE_LOW)
    if found["clear_agreement"] >= least:
        return []
    return [f"first choices agree at {found['clear_agreement']:.2%} of the positions where they are clear, {least:.1%} is the least"]


def _tokens(found: dict[str, Any], prompts: int) -> list[str]:
    wanted = {"strings": len(STRINGS), "prompts": prompts}
    wrong = {name: number - found[f"{name}_same"] for name, number in wanted.items()}
    return [f"{wrong[name]} of {wanted[name]} {name} become other tokens" for name in wanted if wrong[name] > 0]


def _stops(found: dict[str, Any], expected: float) -> list[str]:
    if "chats" not in found or found["chats_ended"] >= expected:
        return []
    return [f"{found['chats'] - found['chats_ended']} of {found['chats']} chats did not stop"]


def _shares(found: dict[str, Any]) -> list[str]:
    return [
        f"{name} fell by {share['fell']:.3f}, {share['allowed']:.3f} is the most"
        for name, share in found.get("falls", {}).items()
        if share["fell"] > share["allowed"]
    ]
