"""The contrast of a cold start: an answer must be likelier after its own budget than after another answer's to the same question.

Under likelihood alone the budget matters at about one token in sixty, where a short and a long answer part. A real model did not read it
at all after a thousand rows (dev/LOG.md, 27). Comparing the same tokens after two budgets cancels everything else:

    softplus(log p(answer | rival budget) - log p(answer | own budget))        InfoNCE (van den Oord et al. 2018) over two budgets

The loss covers the body up to a few tokens after the answers part: that is cheap, and easy tokens cannot win it. It vanishes once the
budget is read.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

COMPARED_TOKENS = 4  # tokens from where the answers part
MIN_BUDGET_RATIO = 1.25  # budgets within this ratio are too alike to tell answers apart
IGNORE_INDEX = -100  # label of a token that is read and not predicted
Example = dict[str, Any]


def add_negatives(examples: Sequence[Example]) -> list[Example]:
    """Add `rival`, the rival's ids before its body, and `lead`, the number of body tokens to compare; 0 without a rival.

    An example has input_ids, completion_mask, `question` (an id), `budget` and `body_at` (index of the first body token). Its rival is the
    answer to the same question with the furthest budget, as a ratio.
    """
    by_question: dict[str, list[Example]] = {}
    for example in examples:
        by_question.setdefault(example["question"], []).append(example)
    return [example | pick_negative(example, by_question[example["question"]]) for example in examples]


def pick_negative(example: Example, others: Sequence[Example]) -> Example:
    def distance(other: Example) -> float:
        return abs(math.log(other["budget"] / example["budget"]))

    rival = max(others, key=distance)
    if distance(rival) < math.log(MIN_BUDGET_RATIO):
        return {"rival": [], "lead": 0}
    body, rival_body = body_ids(example), body_ids(rival)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(body, rival_body, strict=False)))
    return {"rival": rival["input_ids"][: rival["body_at"]], "lead": min(len(body), same + COMPARED_TOKENS)}


def body_ids(example: Example) -> list[int]:
    """Ids of the body and the closing tag."""
    return example["input_ids"][example["body_at"] :]


class Collator(DataCollatorForLanguageModeling):
    """TRL's batch; `contrast` holds the compared tokens, all after their own budget, then all after their rival's."""

    def torch_call(self, examples: list[Example]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if any(example["lead"] for example in examples):
            batch["contrast"] = super().torch_call([*contrast_rows(examples, "own"), *contrast_rows(examples, "rival")])
        return batch


def contrast_rows(examples: Sequence[Example], budget: str) -> Iterator[Example]:
    for example in examples:
        if example["lead"]:
            before = example["rival"] if budget == "rival" else example["input_ids"][: example["body_at"]]
            lead = body_ids(example)[: example["lead"]]
            yield {"input_ids": [*before, *lead], "labels": [IGNORE_INDEX] * len(before) + lead}


def contrast_loss(model: nn.Module, compared: dict[str, Tensor]) -> Tensor:
    """Mean contrast over the pairs. `compared`: token rows of `Collator`, (2 x pairs, length); `model`: wrapped by TRL's trainer."""
    log_probs = model(**compared, use_cache=False, fused_lm_head=True).log_probs.sum(1)
    own, rival = log_probs.chunk(2)
    return F.softplus(rival - own).mean()
