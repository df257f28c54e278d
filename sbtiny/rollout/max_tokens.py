"""`--max-tokens auto`: most tokens of an answer by the model's own lengths, from a probe of some answers."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from sbtiny.config import AUTO, AUTO_LIMIT
from sbtiny.errors import InputError
from sbtiny.progress import bar, console
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question

PROBE_ANSWERS = 32
QUANTILE, MARGIN, MULTIPLE = 0.95, 1.5, 16
FIRST_LIMIT = 512  # tokens; twice as many for those that it cuts, and so on up to AUTO_LIMIT
HEAD_ROOM = 64  # tokens for a given budget, which stands in the prompt


def choose_max_tokens(
    wanted: int | str,
    policy: Policy,
    questions: Sequence[Question],
    sampling: Sampling,
    seed: int,
    *,
    most: int = AUTO_LIMIT,
    give: Callable[[list[Question]], Sequence[int | None]] | None = None,
    initial: Sampling | None = None,
) -> int:
    """Most tokens of an answer: a number as it is wanted; for auto, what a probe finds, at most `most`.

    `give`: makes the budgets that will be given. `initial`: the initial model answers too, sampled so, and the larger number counts.
    """
    if wanted != AUTO:
        return wanted
    asked = draw_probe(questions, seed)
    chosen = probe_max_tokens(policy, asked, sampling, seed, give(asked) if give else (), most)
    if initial:
        with policy.initial_model():
            chosen = max(chosen, probe_max_tokens(policy, asked, initial, seed, most=most))
    return chosen


def draw_probe(questions: Sequence[Question], seed: int) -> list[Question]:
    """PROBE_ANSWERS of the questions by a seed of the probe's own; some twice where there are fewer."""
    rng = random.Random(f"{seed}/max_tokens")
    fewer = len(questions) < PROBE_ANSWERS
    return rng.choices(questions, k=PROBE_ANSWERS) if fewer else rng.sample(questions, PROBE_ANSWERS)


def fit_max_tokens(ended: Sequence[int], answers: int, most: int) -> int:
    """Most tokens of an answer, at most `most`, by the tokens of those of `answers` that ended.

    Their QUANTILE, times MARGIN, in multiples of MULTIPLE. The rest are loops, in most models, which no limit holds. Where they are more
    than half, the model needs more than a probe can tell, and has `most`.
    """
    if 2 * len(ended) < answers or not ended:
        return most
    longest = sorted(ended)[math.ceil(QUANTILE * len(ended)) - 1]
    return min(most, math.ceil(longest * MARGIN / MULTIPLE) * MULTIPLE)


def is_settled(ended: int, new: int, answers: int) -> bool:
    """Whether longer answers would tell no more: nearly all have ended, or half of them and twice the tokens ended no other."""
    return ended >= QUANTILE * answers or (2 * ended >= answers and not new)


def probe_lengths(policy: Policy, requests: Sequence[Request], sampling: Sampling) -> list[int]:
    """Tokens of the answers that end. Doubles their limit from FIRST_LIMIT to that of the requests, until `is_settled`.

    An answer that was cut is sampled again, by the same seed: loops are few and would else be paid for at the largest limit.
    """
    ended: list[int] = []
    todo, limit, most = list(requests), FIRST_LIMIT, requests[0].max_tokens
    with bar("probing lengths", len(requests)) as advance:
        while todo:
            episodes = policy.sample([replace(request, max_tokens=min(limit, most)) for request in todo], sampling)
            new = [len(episode.completion_ids) for episode in episodes if episode.ended]
            todo = [request for request, episode in zip(todo, episodes, strict=True) if not episode.ended]
            ended += new
            for _ in new:
                advance()
            if limit >= most or is_settled(len(ended), len(new), len(requests)):
                break
            limit *= 2
    return ended


def probe_max_tokens(
    policy: Policy, questions: Sequence[Question], sampling: Sampling, seed: int, budgets: Sequence[int | None] = (), most: int = AUTO_LIMIT
) -> int:
    """Tokens of an answer, at most `most`, by one answer to each of the questions (`draw_probe`); prints what it chose and why.

    `budgets`: those that will be given, one a question. Raises InputError where the prompts leave no room.
    """
    prompts = [policy.prompt(q.question, q.system) for q in questions]
    most = min(most, AUTO_LIMIT, (policy.engine.max_positions or math.inf) - max(map(len, prompts)) - HEAD_ROOM)
    if most < MULTIPLE:
        raise InputError("the questions leave no room for an answer: give shorter ones, or a number for --max-tokens")
    given = budgets or [None] * len(prompts)
    first = random.Random(f"{seed}/max_tokens/answers").getrandbits(62)
    requests = [
        policy.request(q.question, most, first + i, budget, system=q.system)
        for i, (q, budget) in enumerate(zip(questions, given, strict=True))
    ]
    ended = probe_lengths(policy, requests, sampling)
    chosen = fit_max_tokens(ended, len(requests), most)
    longest = f", the longest after {max(ended)} tokens" if ended else ""
    console.print(f"max_tokens auto: {chosen} ({len(ended)} of {len(requests)} answers end{longest})", markup=False)
    return chosen
