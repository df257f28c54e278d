"""Evaluate a policy on held-out questions: the samples and the `eval.json` of a run folder."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sbtiny.budget.metrics import Sample, summarise
from sbtiny.budget.protocol import MAX_BUDGET, BudgetChoice, parse_budget_option
from sbtiny.config import EvalSettings
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.max_tokens import choose_max_tokens
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier


def sample_with_progress(policy: Policy, requests: Sequence[Request], sampling: Sampling, title: str) -> list[Episode]:
    started, tokens = time.perf_counter(), 0
    with bar(title, len(requests)) as advance:

        def count(_: int, episode: Episode) -> None:
            nonlocal tokens
            tokens += len(episode.completion_ids)
            advance(note=f"{tokens / (time.perf_counter() - started):.0f} tok/s")

        return policy.sample(requests, sampling, count)


def with_seeds(questions: Sequence[Question], seed: int) -> Iterator[tuple[Question, int]]:
    """Each question and the seed of its one request, which no other question of this seed or the next ones has."""
    return ((question, seed * 1_000_003 + i) for i, question in enumerate(questions))


def stated_budgets(policy: Policy, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[int | None]:
    """Sample only the budget tag for each question. None where the model states no budget."""
    requests = [policy.budget_request(q.question, own, q.system) for q, own in with_seeds(questions, seed)]
    return [episode.parsed.budget for episode in sample_with_progress(policy, requests, sampling, "asking for budgets")]


def given_budgets(policy: Policy, questions: Sequence[Question], choice: BudgetChoice, sampling: Sampling, seed: int) -> list[int | None]:
    """Choose the budget to prefill for each question: none, a fixed one, or a multiple of the stated one, 1 to MAX_BUDGET."""
    if choice.mode == "auto":
        return [None] * len(questions)
    if choice.mode == "fixed":
        return [int(choice.value)] * len(questions)
    stated = stated_budgets(policy, questions, sampling, seed)
    return [None if b is None else min(MAX_BUDGET, max(1, round(b * choice.value))) for b in stated]


def with_max_tokens(policy: Policy, questions: Sequence[Question], settings: EvalSettings, seed: int, budget: str = "auto") -> EvalSettings:
    """The settings with a number for `max_tokens`, for the largest `budget` that will be asked for."""
    sampling, choice = Sampling(settings.temperature, settings.top_p), parse_budget_option(budget)
    most = choose_max_tokens(
        settings.max_tokens, policy, questions, sampling, seed, give=lambda asked: given_budgets(policy, asked, choice, sampling, seed)
    )
    return replace(settings, max_tokens=most)


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    verify: Verifier,
    choice: BudgetChoice,
    settings: EvalSettings,
    seed: int,
    title: str = "evaluating",
) -> tuple[list[Episode], list[Sample]]:
    """Sample one answer to each question; returns episodes and their samples for the metrics."""
    sampling = Sampling(settings.temperature, settings.top_p)
    if settings.cut_at and choice.mode == "auto":  # the cut is a share of the stated budget, so sample that first
        choice = BudgetChoice("scaled", 1.0)
    given = given_budgets(policy, questions, choice, sampling, seed)
    requests = [
        policy.request(q.question, settings.max_tokens, own, budget, limits=limits_for(policy, settings, budget), system=q.system)
        for (q, own), budget in zip(with_seeds(questions, seed), given, strict=True)
    ]
    episodes = sample_with_progress(policy, requests, sampling, title)
    return episodes, [score_answer(q, e, verify) for q, e in zip(questions, episodes, strict=True)]


def limits_for(policy: Policy, settings: EvalSettings, budget: int | None) -> Limits | None:
    """Choose where to cut an answer: at `cut_at` of its budget or at `ceiling` tokens, whichever is less. None for no cut."""
    share = max(1, int(settings.cut_at * budget)) if settings.cut_at and budget is not None else None
    ceilings = [tokens for tokens in (share, settings.ceiling) if tokens]
    return policy.cut_limits(min(ceilings), settings.wrap_up, settings.reserve) if ceilings else None


def score_answer(question: Question, episode: Episode, verify: Verifier) -> Sample:
    ended = episode.ended  # by an end token, also after a wrap-up
    return Sample(
        correct=ended and verify(episode.solution, question),
        ok=ended and episode.parsed.ok,
        budget=episode.budget if ended else episode.parsed.budget,
        length=episode.length,
        level=question.level,
    )


def eval_record(samples: Sequence[Sample], model: str, settings: EvalSettings, seed: int) -> dict[str, Any]:
    """Build the content of eval.json."""
    head = {"model": model, "task": settings.task, "split": settings.split, "questions": len(samples), "seed": seed}
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_tokens}
    limits = {"budget": settings.budget, "cut": settings.cut_at, "ceiling": settings.ceiling}
    return head | sampling | limits | summarise(samples)
