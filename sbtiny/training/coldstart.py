"""Cold-start data: the model's own correct answers, each labelled with its own token count (paper section 2).

A row is one line of JSON: `id, question, answer, level, response, budget` where `budget` counts the tokens of `response`. Rows of wrong
answers are dropped; the questions they came from keep b_max = infinity.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sbtiny.budget.protocol import TAG
from sbtiny.config import DataSettings
from sbtiny.errors import Failed, InputError
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question, Trace


@dataclass(frozen=True, slots=True)
class Harvest:
    """Labelled rows and what was left out: answers cut at the limit and wrong ones."""

    rows: list[dict[str, Any]]
    sampled: int
    cut: int
    wrong: int


def sample_answers(policy: Policy, questions: Sequence[Question], data: DataSettings, seed: int) -> list[Episode]:
    """`data.samples` answers to each question, in order, as the model gives them today."""
    requests = [
        policy.request(question.question, data.max_tokens, seed=seed * 1_000_003 + number * data.samples + copy)
        for number, question in enumerate(questions)
        for copy in range(data.samples)
    ]
    started, tokens = time.perf_counter(), 0
    with bar("sampling own answers", len(requests)) as advance:

        def count(_: int, episode: Episode) -> None:
            nonlocal tokens
            tokens += len(episode.completion_ids)
            advance(note=f"{tokens / (time.perf_counter() - started):.0f} tok/s")

        return policy.sample(requests, Sampling(temperature=data.temperature), count)


def harvest(
    policy: Policy,
    questions: Sequence[Question],
    verify: Callable[[str, Question], bool],
    data: DataSettings,
    seed: int,
) -> Harvest:
    """Sample, keep the correct, label. Raises Failed when the model got nothing right: there is nothing to learn from."""
    episodes = sample_answers(policy, questions, data, seed)
    asked = [question for question in questions for _ in range(data.samples)]
    rows, cut, wrong = [], 0, 0
    for question, episode in zip(asked, episodes, strict=True):
        if episode.stop_reason != "end":
            cut += 1
        elif TAG.search(episode.solution) or not verify(episode.solution, question):
            wrong += 1  # a tag inside a body could not be read back
        else:
            rows.append(label(policy, question, episode.solution))
    if not rows:
        raise Failed(
            f"no usable answer in {len(episodes)}: {wrong} wrong, {cut} cut at {data.max_tokens} tokens; check --task or data.max_tokens"
        )
    return Harvest(rows, len(episodes), cut, wrong)


def label(policy: Policy, question: Question | Trace, response: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "answer": question.answer,
        "level": question.level,
        "response": response,
        "budget": len(policy.encode(response)),
    }


def label_traces(policy: Policy, traces: Sequence[Trace], verify: Callable[[str, Question], bool]) -> Harvest:
    """Rows from answers written elsewhere: finished ones that are correct, as published or, where that is not said, as verified."""
    rows, cut, wrong = [], 0, 0
    for trace in traces:
        question = Question(trace.id, trace.question, trace.answer, trace.level)
        if not trace.finished:
            cut += 1
        elif not (verify(trace.response, question) if trace.correct is None else trace.correct):
            wrong += 1
        elif tag := TAG.search(trace.response):
            raise InputError(f"trace {trace.id} already holds the tag {tag.group()}: give the plain answers")
        else:
            rows.append(label(policy, question, trace.response))
    if not rows:
        raise Failed(f"no usable trace in {len(traces)}: {wrong} wrong, {cut} unfinished")
    return Harvest(rows, len(traces), cut, wrong)
