"""Held-out figures of a policy: the `eval.json` of a run folder, and the comparison of two evaluations on the same questions."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from sbtiny.budget.metrics import Sample, compression, paired_difference, summarise
from sbtiny.budget.protocol import MAX_BUDGET, BudgetChoice
from sbtiny.config import EvalSettings
from sbtiny.progress import bar
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question

Verify = Callable[[str, Question], bool]


def answer(policy: Policy, requests: Sequence[Request], sampling: Sampling, title: str) -> list[Episode]:
    started, tokens = time.perf_counter(), 0
    with bar(title, len(requests)) as advance:

        def count(_: int, episode: Episode) -> None:
            nonlocal tokens
            tokens += len(episode.completion_ids)
            advance(note=f"{tokens / (time.perf_counter() - started):.0f} tok/s")

        return policy.sample(requests, sampling, count)


def own_budgets(policy: Policy, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[int | None]:
    """The number the model says to each question: only the tag is sampled. None where it says none."""
    requests = [policy.budget_request(q.question, seed * 1_000_003 + i, q.system) for i, q in enumerate(questions)]
    return [episode.parsed.budget for episode in answer(policy, requests, sampling, "asking for budgets")]


def budgets_given(
    policy: Policy, questions: Sequence[Question], choice: BudgetChoice, sampling: Sampling, seed: int
) -> list[int | None]:
    """The budget to prefill for each question: none, the same number, or a multiple of the model's own, from 1 to MAX_BUDGET."""
    if choice.mode == "auto":
        return [None] * len(questions)
    if choice.mode == "fixed":
        return [int(choice.value)] * len(questions)
    own = own_budgets(policy, questions, sampling, seed)
    return [None if b is None else min(MAX_BUDGET, max(1, round(b * choice.value))) for b in own]


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    verify: Verify,
    choice: BudgetChoice,
    settings: EvalSettings,
    seed: int,
    title: str = "evaluating",
) -> tuple[list[Episode], list[Sample]]:
    """One answer to each question, and what the metrics need to know of it."""
    sampling = Sampling(settings.temperature, settings.top_p)
    if settings.cut and choice.mode == "auto":  # where to cut follows from the number, so that is asked for first
        choice = BudgetChoice("scaled", 1.0)
    given = budgets_given(policy, questions, choice, sampling, seed)
    wrap_up = tuple(policy.encode(settings.wrap_up))
    requests = [
        policy.request(
            q.question, settings.max_tokens, seed * 1_000_003 + i, budget, limits=limits(settings, budget, wrap_up), system=q.system
        )
        for i, (q, budget) in enumerate(zip(questions, given, strict=True))
    ]
    episodes = answer(policy, requests, sampling, title)
    return episodes, [judge(q, e, verify) for q, e in zip(questions, episodes, strict=True)]


def limits(settings: EvalSettings, budget: int | None, wrap_up: tuple[int, ...]) -> Limits | None:
    """Where an answer held to `budget` is cut: at a share of it, at so many tokens, whichever comes first."""
    share = max(1, int(settings.cut * budget)) if settings.cut and budget is not None else None
    ceilings = [tokens for tokens in (share, settings.ceiling) if tokens]
    return Limits(min(ceilings), None, wrap_up, settings.reserve) if ceilings else None


def judge(question: Question, episode: Episode, verify: Verify) -> Sample:
    ended = episode.ended  # by its own end token, after a wrap-up too
    return Sample(
        correct=ended and verify(episode.solution, question),
        ok=ended and episode.parsed.ok,
        budget=episode.budget if ended else None,
        length=episode.length,
        level=question.level,
    )


def record(samples: Sequence[Sample], model: str, settings: EvalSettings, seed: int) -> dict[str, Any]:
    """The content of eval.json (design.md section 5)."""
    head = {"model": model, "task": settings.task, "questions": len(samples), "seed": seed}
    asked = {"temperature": settings.temperature, "budget": settings.budget, "cut": settings.cut, "ceiling": settings.ceiling}
    return head | asked | summarise(samples)


def compare(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, Any]:
    """Compression and paired accuracy change (with its 95 % interval) of two evaluations on the same questions, in the same order."""
    change = paired_difference([s.correct for s in after], [s.correct for s in before])
    lengths = [sum(s.length for s in group) / len(group) for group in (before, after)]
    return {
        "compression": compression(*lengths),
        "accuracy_change": change["mean"],
        "accuracy_change_ci95": [change["lo"], change["hi"]],
    }
