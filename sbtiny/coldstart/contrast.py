"""The contrast of a cold start: an answer must be likelier behind its own number than behind that of another answer to its question.

By likelihood alone the number is worth about one token in sixty, the one where a short answer and a long one part; on a real model it was
not read at all after a thousand rows (dev/LOG.md, 27). Here everything else falls out, for the same tokens are compared with
themselves:

    softplus(log p(answer | rival number) - log p(answer | own number))        InfoNCE (van den Oord et al. 2018) over two numbers

It is taken over the first tokens from where the two answers part, so that it costs little and cannot be won by what is easy to say
anyhow; it vanishes as the number is read, and likelihood keeps the rest in place.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

LEAD = 4  # tokens from where the answers part
NEAR = 1.25  # numbers within this ratio say nearly the same: no answer tells them apart
IGNORED = -100  # label of a token that is read and not predicted
Example = dict[str, Any]


def rivalled(examples: Sequence[Example]) -> list[Example]:
    """The examples with `rival`, the ids up to the body as its rival has them, and `lead`, how many tokens after them are compared.

    An example has input_ids, completion_mask, `question` (an id), `budget` and `body_at` (the body's first token). Its rival is the answer
    to the same question whose number is furthest away, as a ratio; without one `lead` is 0.
    """
    by_question: dict[str, list[Example]] = {}
    for example in examples:
        by_question.setdefault(example["question"], []).append(example)
    return [example | facing(example, by_question[example["question"]]) for example in examples]


def facing(example: Example, others: Sequence[Example]) -> Example:
    def distance(other: Example) -> float:
        return abs(math.log(other["budget"] / example["budget"]))

    rival = max(others, key=distance)
    if distance(rival) < math.log(NEAR):
        return {"rival": [], "lead": 0}
    mine, its = written(example), written(rival)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, its, strict=False)))
    return {"rival": rival["input_ids"][: rival["body_at"]], "lead": min(len(mine), same + LEAD)}


def written(example: Example) -> list[int]:
    """The body and what closes it."""
    return example["input_ids"][example["body_at"] :]


class Collator(DataCollatorForLanguageModeling):
    """TRL's, and under `contrast` the compared beginnings: all behind their own number, then all behind their rival's."""

    def torch_call(self, examples: list[Example]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if any(example["lead"] for example in examples):
            batch["contrast"] = super().torch_call([*beginnings(examples, "own"), *beginnings(examples, "rival")])
        return batch


def beginnings(examples: Sequence[Example], behind: str) -> Iterator[Example]:
    for example in examples:
        if example["lead"]:
            before = example["rival"] if behind == "rival" else example["input_ids"][: example["body_at"]]
            lead = written(example)[: example["lead"]]
            yield {"input_ids": [*before, *lead], "labels": [IGNORED] * len(before) + lead}


def loss(model: nn.Module, compared: dict[str, Tensor]) -> Tensor:
    """The mean over pairs; `compared` holds token rows (2 x pairs, length) as `Collator` lays them, `model` is one that TRL has fitted."""
    log_probs = model(**compared, use_cache=False, fused_lm_head=True).log_probs.sum(1)
    own, rival = log_probs.chunk(2)
    return F.softplus(rival - own).mean()
