"""The contrast of a cold start: an answer must be likelier after its own budget than after another one.

Under likelihood alone the budget matters at about one token in sixty: where a short and a long answer part, and where the short one ends.
A real model did not read it at all after a thousand rows (dev/LOG.md, 27), the bundled one after thousands of updates or, by chance, never
(37). Comparing the same tokens after two budgets cancels everything else:

    softplus(log p(tokens | rival budget) - log p(tokens | own budget))        InfoNCE (van den Oord et al. 2018) over two budgets

An answer's rival is the one to the same question whose budget is furthest from its own. A longer answer is compared after its rival's
budget. A shorter one is compared after any budget up to that: were it always that, one threshold for all questions would tell them apart,
and budgets on one side of it were not read (39).

The loss vanishes once the budget is read, so later updates can leave it out (`sft.contrast_share`). Left out too early, it leaves a level
unread (44).
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

PARTING_TOKENS = 4  # from where the answers part
END_TOKENS = 8  # around the end of the shorter answer
BEHIND_END = 2  # of these: the longer answer's, behind it
MIN_BUDGET_RATIO = 1.25  # budgets within this ratio are too alike to tell answers apart
NEAREST_RIVAL = 1.5  # budgets that a shorter answer is compared after are drawn from this multiple of its own on
IGNORE_INDEX = -100  # label of a token that is read and not predicted
Example = dict[str, Any]


def add_negatives(examples: Sequence[Example], encode_budget: Callable[[int], list[int]], seed: int) -> list[Example]:
    """Add `rival`, the ids before the body with another budget, and `compared`, the indices of the body tokens to compare; none without.

    An example has input_ids, completion_mask, `question` (an id), `budget` and `body_at` (index of the first body token). Its rival is the
    answer to the same question with the furthest budget, as a ratio. Those of one question come side by side. `encode_budget` gives
    the ids of a budget with its tags.
    """
    rng = random.Random(seed)
    by_question: dict[str, list[Example]] = {}
    for example in examples:
        by_question.setdefault(example["question"], []).append(example)
    return [example | pick_negative(example, others, encode_budget, rng) for others in by_question.values() for example in others]


def pick_negative(
    example: Example, others: Sequence[Example], encode_budget: Callable[[int], list[int]], rng: random.Random
) -> dict[str, list[int]]:
    own = example["budget"]

    def distance(other: Example) -> float:
        return abs(math.log(other["budget"] / own))

    rival = max(others, key=distance)
    if distance(rival) < math.log(MIN_BUDGET_RATIO):
        return {"rival": [], "compared": []}
    body, rival_body = body_ids(example), body_ids(rival)
    parting = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(body, rival_body, strict=False)))
    stop = min(len(body), len(rival_body) + BEHIND_END)
    compared = [i for i in range(stop) if parting <= i < parting + PARTING_TOKENS or i >= stop - END_TOKENS]
    prompt = example["input_ids"][: example["body_at"] - len(encode_budget(own))]
    return {"rival": [*prompt, *encode_budget(draw_rival_budget(own, rival["budget"], rng))], "compared": compared}


def draw_rival_budget(own: int, rival: int, rng: random.Random) -> int:
    """The rival's budget where it is below `NEAREST_RIVAL` times the own; else one drawn log-uniformly from there up to the rival's."""
    nearest = NEAREST_RIVAL * own
    return round(math.exp(rng.uniform(math.log(nearest), math.log(rival)))) if rival > nearest else rival


def body_ids(example: Example) -> list[int]:
    """Ids of the body and the closing tag."""
    return example["input_ids"][example["body_at"] :]


class Collator(DataCollatorForLanguageModeling):
    """TRL's batch. Its `contrast` holds the answers with a rival after the other budget, and `compared` (rows, length), which tokens."""

    def torch_call(self, examples: list[Example]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if pairs := [example for example in examples if example["compared"]]:
            compared = torch.zeros_like(batch["labels"], dtype=torch.bool)
            for row, example in zip(compared, examples, strict=True):
                row[[example["body_at"] + i for i in example["compared"]]] = True
            batch["contrast"] = super().torch_call([rival_row(pair) for pair in pairs]) | {"compared": compared}
        return batch


def rival_row(example: Example) -> Example:
    """The answer up to its last compared token, after the other budget; the compared tokens are its labels."""
    before, chosen = example["rival"], set(example["compared"])
    body = body_ids(example)[: max(chosen) + 1]
    labels = [token if i in chosen else IGNORE_INDEX for i, token in enumerate(body)]
    return {"input_ids": [*before, *body], "labels": [IGNORE_INDEX] * len(before) + labels}


def contrast_losses(own: Tensor, rival: Tensor, compared: Tensor) -> Tensor:
    """Contrast of each pair (pairs,).

    `own` (rows, length - 1): log-probabilities of a batch's tokens from the second on; `compared` (rows, length): which count, in the rows
    that have a rival. `rival` (pairs, length - 1): those of `Collator`'s `contrast`, 0 where they do not count.
    """
    counted = compared[:, 1:]
    own = torch.where(counted, own, 0).sum(1)[counted.any(1)]
    return F.softplus(rival.sum(1) - own)
