"""Foretells a question's budget: a ridge regression of log length on the hidden state that the initial model has of the question.

The length of one answer is mostly chance. A model trained on a thousand such lengths learns their distribution and nothing of the
question, though its middle layers know: a linear probe there foretells the length of unseen questions (dev/LOG.md, 32). So the budget to
state is the probe's. It is free of chance, and every question has one. It is fitted to wrong answers too: they are as long as right ones
to the same question, and most answers of a weak model are wrong (dev/LOG.md, 41).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sbtiny.coldstart.sample_correct import fill_row
from sbtiny.errors import InputError
from sbtiny.progress import bar
from sbtiny.rollout.engines.generate import PAD_TOKEN, left_pad
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.row_files import Row
from sbtiny.tasks.sources import Question

Array = NDArray[np.float64]
DEPTH = 2 / 3  # of the layers: where lengths were read best; the last ones are busy with the next token
BATCH = 16  # prompts a forward pass
FOLDS = 5  # a question's own length does not foretell it
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, as multiples of the number of questions
FEWEST_QUESTIONS = 50  # with an answer that ended


def check_foretellable(policy: Policy, questions: Sequence[Question]) -> None:
    """Raise InputError, before hours of sampling, where no budget can be foretold: too few questions, or no model to read."""
    if policy.model is None:
        raise InputError("data.budget_quantile reads a model's hidden states, which llama.cpp does not give: use --engine generate")
    if len(questions) < FEWEST_QUESTIONS:
        raise InputError(f"data.budget_quantile needs {FEWEST_QUESTIONS} questions or more, not {len(questions)}: raise data.limit")


def foretell_budgets(policy: Policy, questions: Sequence[Question], lengths: Mapping[str, Sequence[int]], quantile: float) -> list[Row]:
    """A row of a budget alone for each question. `lengths`: tokens of a question's answers that ended, right or wrong, by its id.

    The budget foretells that quantile of the lengths. Raises InputError where too few questions have an answer that ended.
    """
    known = np.array([i for i, question in enumerate(questions) if question.id in lengths])
    if len(known) < FEWEST_QUESTIONS:
        raise InputError(
            f"{len(known)} questions with an answer that ended are too few to foretell a budget from (data.budget_quantile): "
            f"ask more (data.limit), at least until {FEWEST_QUESTIONS} have one"
        )
    logs = np.log([np.quantile(lengths[questions[i].id], quantile) for i in known])
    states = read_hidden_states(policy, questions)
    crossed, penalty = cross_predict(states[known], logs)
    foretold = fit_ridges(states[known], logs)(states)[penalty]
    foretold[known] = crossed
    return [fill_row(question, None, round_budget(np.exp(value))) for question, value in zip(questions, foretold, strict=True)]


def round_budget(tokens: float) -> int:
    """Round to two digits: a third is chance, and would have to be learnt."""
    return max(1, int(round(tokens, 1 - int(np.log10(tokens)) if tokens >= 100 else 0)))


@torch.no_grad()
def read_hidden_states(policy: Policy, questions: Sequence[Question]) -> Array:
    """The hidden state at the last token of each prompt, DEPTH of the way up: (questions, width)."""
    prompts = [policy.prompt(question.question, question.system) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    states: Array | None = None
    with bar("reading questions", len(prompts)) as advance:
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            ids, mask = left_pad([prompts[i] for i in places], PAD_TOKEN, policy.model.device)
            layers = policy.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
            ).hidden_states
            last = layers[round(DEPTH * (len(layers) - 1))][:, -1].double().cpu().numpy()
            states = np.empty((len(prompts), last.shape[1])) if states is None else states
            states[places] = last
            advance(len(places))
    return states


def fit_ridges(states: Array, targets: Array) -> Callable[[Array], Array]:
    """Fit a ridge regression for each of PENALTIES on standardized states; returns their predictions, (penalties, rows).

    With states = U S V', the weights are V (S U' targets) / (S^2 + penalty): one decomposition serves all.
    """
    mean, spread, middle = states.mean(0), states.std(0) + 1e-6, targets.mean()
    left, scales, right = np.linalg.svd((states - mean) / spread, full_matrices=False)
    along = scales * (left.T @ (targets - middle))
    weights = right.T @ (along[:, None] / (scales[:, None] ** 2 + len(states) * np.array(PENALTIES)))
    return lambda others: ((others - mean) / spread @ weights + middle).T


def cross_predict(states: Array, targets: Array) -> tuple[Array, int]:
    """Predict each row from the rows of the other folds, with the place in PENALTIES that has the smallest squared error there."""
    folds = np.random.default_rng(0).permutation(len(targets)) % FOLDS
    predicted = np.empty((len(PENALTIES), len(targets)))
    for fold in range(FOLDS):
        inside = folds == fold
        predicted[:, inside] = fit_ridges(states[~inside], targets[~inside])(states[inside])
    best = int(np.square(predicted - targets).sum(1).argmin())
    return predicted[best], best
