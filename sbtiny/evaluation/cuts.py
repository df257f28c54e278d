"""The interruption curve: accuracy of answers stopped at shares of their stated budget, by a plain cut and by a wrap-up.

A plain cut ends the answer, and what is there is judged. A wrap-up injects a text and leaves a few tokens for an answer. What training
with `grpo.cut_share` is worth shows when the curves of two runs are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sbtiny.budget.metrics import Sample, summarise
from sbtiny.rollout.episode import Episode
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier

CUT_SHARES = (1.0, 0.75, 0.5, 0.25)  # of the stated budget
UNCUT_BUDGET = "1x"  # the stated budget, prefilled as in cut answers, so that uncut answers are the same but for the cut
PLAIN = {"wrap_up": "", "reserve": 1}  # the least reserve; only an answer after </think> has it
Evaluated = tuple[dict[str, Any], Sequence[Episode], Sequence[Sample]]


def evaluate_cuts(one: Callable[..., Evaluated], questions: Sequence[Question], verify: Verifier) -> list[dict[str, Any]]:
    """Compute the content of cuts.json: uncut first, then each share, the figures of the wrap-up with those of the plain cut in `plain`.

    `one` evaluates with changed settings. `cut_rate` is the share of answers that were cut.
    """
    result, episodes, _ = one(budget=UNCUT_BUDGET, cut_at=0.0)
    rows = [with_cut_rate(result, episodes) | {"plain": None}]
    for share in CUT_SHARES:
        wrapped, of_wrapped, _ = one(budget=UNCUT_BUDGET, cut_at=share)
        plain, of_plain, samples = one(budget=UNCUT_BUDGET, cut_at=share, **PLAIN)
        judged = [judge_cut(q, e, s, verify) for q, e, s in zip(questions, of_plain, samples, strict=True)]
        rows.append(with_cut_rate(wrapped, of_wrapped) | {"plain": with_cut_rate(plain | summarise(judged), of_plain)})
    return rows


def judge_cut(question: Question, episode: Episode, sample: Sample, verify: Verifier) -> Sample:
    """Judge what is there where the ceiling cut it. What ran to `max_tokens` is wrong, as in the other rows."""
    return replace(sample, correct=verify(episode.solution, question)) if episode.stop_reason == "ceiling" else sample


def with_cut_rate(result: dict[str, Any], episodes: Sequence[Episode]) -> dict[str, Any]:
    return result | {"cut_rate": sum(e.stop_reason == "ceiling" for e in episodes) / len(episodes)}
