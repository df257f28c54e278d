"""Length rewards of other papers, as we read them: plain functions of lengths and correctness. Pure.

Lengths, targets and limits are in tokens. None of these rewards uses a stated budget; L1's target is a given budget.
"""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from sbtiny.errors import InputError


def l1_exact(length: int, correct: bool, target: int, alpha: float = 0.0003) -> float:
    """L1-Exact (Aggarwal & Welleck 2025, arXiv 2503.04697): I(correct) - alpha |target - length|.

    Wrong and right answers pay alike for their length. The paper's alpha suits targets of up to 4,000 tokens.
    """
    return float(correct) - alpha * abs(target - length)


def l1_max(length: int, correct: bool, target: int, alpha: float = 0.0003, delta: float = 0.5) -> float:
    """L1-Max (Aggarwal & Welleck 2025, arXiv 2503.04697): I(correct) clip(alpha (target - length) + delta, 0, 1).

    The target is a soft maximum: a right answer of that length earns delta, a shorter one more.
    """
    return float(correct) * min(1.0, max(0.0, alpha * (target - length) + delta))


def arora_zanette(lengths: Sequence[int], correct: Sequence[bool], alpha: float = 0.1) -> list[float]:
    """Arora & Zanette 2025 (arXiv 2502.04463): I(correct) (1 - alpha sigmoid((length - mean) / std)), over one question's answers.

    Mean and standard deviation are those of the correct answers. The sigmoid is 1/2 where all of these have one length.
    """
    check(lengths, correct)
    right = [length for length, good in zip(lengths, correct, strict=True) if good]
    if not right:
        return [0.0] * len(lengths)
    mean, std = fmean(right), pstdev(right)

    def one(length: int) -> float:
        return 1 - alpha / (1 + math.exp((mean - length) / std)) if std else 1 - alpha / 2

    return [one(length) if good else 0.0 for length, good in zip(lengths, correct, strict=True)]


def kimi(lengths: Sequence[int], correct: Sequence[bool], weight: float = 1.0) -> list[float]:
    """Kimi k1.5's length penalty (Kimi Team 2025, arXiv 2501.12599, section 2.3.3) added to correctness, over one question's answers.

    I(correct) + weight p with p = lambda for a correct answer and min(0, lambda) for a wrong one, where
    lambda = 1/2 - (length - shortest) / (longest - shortest), shortest and longest of all answers. p = 0 where these are equal.
    """
    check(lengths, correct)
    low, high = min(lengths, default=0), max(lengths, default=0)

    def one(length: int, good: bool) -> float:
        share = 0.5 - (length - low) / (high - low) if high > low else 0.0
        return float(good) + weight * (share if good else min(0.0, share))

    return [one(length, good) for length, good in zip(lengths, correct, strict=True)]


def hard_cap(length: int, correct: bool, limit: int) -> float:
    """ThinkPrune (Hou et al. 2025, arXiv 2504.01296): I(correct and length <= limit). Text after the limit is not read.

    The paper lowers the limit from round to round; here the caller chooses it.
    """
    return float(correct and length <= limit)


def check(lengths: Sequence[int], correct: Sequence[bool]) -> None:
    if len(lengths) != len(correct):
        raise InputError(f"{len(lengths)} lengths and {len(correct)} verdicts: give one of each for every answer")
