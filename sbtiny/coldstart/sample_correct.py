"""Cold-start data: the model's own correct answers, each labelled with its own token count (paper section 2).

A row is one line of JSON: `id, question, answer, level, response, budget` where `budget` counts the tokens of `response`. Rows of wrong
answers are dropped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from sbtiny.budget.protocol import FORMATS, parts
from sbtiny.config import DataSettings, Settings
from sbtiny.errors import InputError
from sbtiny.models.prompt import check_texts, first_in, special_tokens
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question, identity
from sbtiny.tasks.traces import Trace
from sbtiny.tasks.verify import Verifier, own_file
from sbtiny.coldstart.build_progress import Partial


@dataclass(frozen=True, slots=True)
class Harvest:
    """Labelled rows and what was left out: answers cut at the limit, wrong ones, evaluation questions (`leaked`), and correct ones that are
    no more of a question's than `data.keep` (`spare`). `turn_ends`: those whose turn end was cut off."""

    rows: list[dict[str, Any]]
    sampled: int
    cut: int
    wrong: int
    leaked: int = 0
    spare: int = 0
    turn_ends: int = 0
    asked: dict[int | None, int] = field(default_factory=dict)  # answers looked at, by level
    right: dict[int | None, int] = field(default_factory=dict)  # of them correct

    def levels(self) -> list[dict[str, Any]]:
        """For each level, and over all: rows, the share of answers accepted, and percentiles of the rows' length in tokens."""
        found = sorted(self.asked, key=lambda level: (level is None, level))
        groups = [(level, [r for r in self.rows if r["level"] == level], self.right.get(level, 0), self.asked[level]) for level in found]
        every = ("all", self.rows, sum(self.right.values()), self.sampled)
        return [
            {"level": level, "rows": len(rows), "accepted": round(right / looked, 4)} | percentiles([r["budget"] for r in rows])
            for level, rows, right, looked in [*groups, every]
        ]


def percentiles(lengths: Sequence[int]) -> dict[str, float | None]:
    points = (10, 50, 90, 100)
    values = np.percentile(lengths, points).tolist() if lengths else [None] * len(points)
    return {f"p{point}": value for point, value in zip(points, values, strict=True)}


def requests_for(policy: Policy, questions: Sequence[Question], data: DataSettings, seed: int) -> list[Request]:
    """`data.samples` requests for each question, in order; the seed of each depends on its place alone."""
    return [
        policy.request(
            question.question, data.max_tokens, seed=seed * 1_000_003 + number * data.samples + copy, system=question.system
        )
        for number, question in enumerate(questions)
        for copy in range(data.samples)
    ]


def sample_answers(
    policy: Policy, requests: Sequence[Request], temperature: float, each: Callable[[int, Episode], None]
) -> list[Episode]:
    """The answers as the model gives them today, in order; `each` is called as one ends."""
    started, tokens = time.perf_counter(), 0
    with bar("sampling own answers", len(requests)) as advance:

        def count(index: int, episode: Episode) -> None:
            nonlocal tokens
            tokens += len(episode.completion_ids)
            each(index, episode)
            advance(note=f"{tokens / (time.perf_counter() - started):.0f} tok/s")

        return policy.sample(requests, Sampling(temperature=temperature), count)


def harvest(policy: Policy, questions: Sequence[Question], verify: Verifier, settings: Settings, file: Path) -> Harvest:
    """Sample, keep the correct, label; what is done stands in `file`.part and is not asked again.

    Raises InputError when the model got nothing right: there is nothing to learn from.
    """
    data = settings.data
    requests = requests_for(policy, questions, data, settings.seed)
    asked = [question for question in questions for _ in range(data.samples)]
    partial = Partial(file, digest(settings, questions))
    todo = [i for i in range(len(requests)) if i not in partial.done]
    special = special_tokens(policy.tokenizer)

    def each(index: int, episode: Episode) -> None:
        answer = todo[index]
        try:
            kind = judged(episode, asked[answer], verify)
            if first_in(episode.solution, special):  # written in the middle: no text could be trained to say it again
                kind = "cut" if kind == "cut" else "wrong"
        except InputError:  # the verifier's: its verdicts so far are worth nothing
            partial.discard()
            raise
        partial.add(answer, kind, label(policy, asked[answer], episode.solution) if kind == "row" else None)

    if todo:
        sample_answers(policy, [requests[i] for i in todo], data.temperature, each)
    found = [partial.done[i] for i in range(len(requests))]
    right = [line["row"] for line in found if line["row"]]
    rows = apart(right, data.keep)
    cut, wrong = (sum(line["kind"] == kind for line in found) for kind in ("cut", "wrong"))
    if not rows:
        partial.remove()  # whatever mends this asks for something else, which could not go on with it
        raise nothing_right(settings, questions[0], len(found), wrong, cut)
    counts = {"asked": by_level(asked), "right": by_level(right)}
    return Harvest(rows, len(found), cut, wrong, spare=len(right) - len(rows), **counts)


def nothing_right(settings: Settings, first: Question, answers: int, wrong: int, cut: int) -> InputError:
    data = settings.data
    what = f"no usable answer in {answers} of {settings.model} to {data.task}: {wrong} wrong, {cut} cut at {data.max_tokens} tokens"
    why = f"the first question is {first.named} with the answer {first.answer[:40]!r}, checked by {data.verifier}"
    mend = "raise data.max_tokens" if cut > wrong else "give easier questions, a better --model or another --verifier"
    return InputError(f"{what}; {why}: {mend}")


def digest(settings: Settings, questions: Sequence[Question]) -> str:
    """What an answer and its verdict depend on; neither the number of slots nor where the questions were read is part of it."""
    d, s = settings.data, settings
    model = (s.model, s.seed, s.format, s.four_bit, s.backend, s.engine)
    told = (model, d.samples, d.temperature, d.max_tokens, d.verifier, own_file(d.verifier), identity(questions))
    return blake2b(repr(told).encode(), digest_size=8).hexdigest()


def judged(episode: Episode, question: Question, verify: Verifier) -> str:
    if episode.stop_reason != "end":
        return "cut"
    usable = episode.solution.strip() and not stray_tag(episode.solution)
    return "row" if usable and verify(episode.solution, question) else "wrong"


def stray_tag(response: str) -> str:
    """What keeps a plain answer from being read back in one of the formats; empty when nothing does."""
    try:
        for form in FORMATS.values():
            parts(response, form)
    except ValueError as error:
        return str(error)
    return ""


def apart(rows: list[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    """At most `keep` rows of each question, as far apart in length as they are: the shortest, the longest, and evenly between; 0 is all.

    Where a question has one row, its length follows from the question, and the number has nothing to say; of two far apart it says all.
    """
    if not keep:
        return rows
    lengths: dict[str, dict[int, int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(row["id"], {}).setdefault(row["budget"], i)
    kept: set[int] = set()
    for by_length in lengths.values():
        order = [by_length[length] for length in sorted(by_length)]
        kept |= {order[round(n * (len(order) - 1) / max(1, keep - 1))] for n in range(keep)}
    return [row for i, row in enumerate(rows) if i in kept]


def by_level(items: Sequence[Question | Trace | dict[str, Any]]) -> dict[int | None, int]:
    levels = [item["level"] if isinstance(item, dict) else item.level for item in items]
    return {level: levels.count(level) for level in dict.fromkeys(levels)}


def label(policy: Policy, question: Question | Trace, response: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "answer": question.answer,
        "level": question.level,
        "response": response,
        "budget": len(policy.encode(response)),
    } | ({"system": question.system} if question.system else {})


def label_traces(policy: Policy, traces: Sequence[Trace], verify: Verifier, keep: int) -> Harvest:
    """Rows from answers written elsewhere: finished ones that are correct, as published or, where that is not said, as verified.

    The answers to one question get the id of its first, so that they count as the model's own would.
    """
    found, cut, wrong = [], 0, 0
    names: dict[tuple[str, str | None], str] = {}
    for trace in traces:
        if not trace.finished:
            cut += 1
        elif not (verify(trace.response, trace.asked()) if trace.correct is None else trace.correct):
            wrong += 1
        elif stray := stray_tag(trace.response):
            raise InputError(f"{trace.asked().named}: {stray}: give the plain answers")
        else:
            check_texts(policy.tokenizer, [trace])
            found.append(label(policy, trace, trace.response) | {"id": names.setdefault((trace.question, trace.system), trace.id)})
    places = {name: place for place, name in enumerate(names.values())}
    right = sorted(found, key=lambda row: places[row["id"]])  # those of a question side by side: one update takes them
    rows = apart(right, keep)
    if not rows:
        first = traces[0].asked()
        why = f"the first is {first.named} with the answer {first.answer[:40]!r}"
        raise InputError(f"no usable trace in {len(traces)}: {wrong} wrong, {cut} unfinished; {why}: check the answers, or --verifier")
    counts = {"turn_ends": sum(t.ended for t in traces), "asked": by_level(traces), "right": by_level(right)}
    return Harvest(rows, len(traces), cut, wrong, spare=len(right) - len(rows), **counts)
