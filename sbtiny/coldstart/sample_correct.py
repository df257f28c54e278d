"""Cold-start data: the model's own correct answers, each labelled with its own token count (paper section 2).

A row is one line of JSON: `id, question, answer, level, response, budget`; `budget` counts the tokens of `response`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from sbtiny.budget.protocol import FORMATS, split_response
from sbtiny.coldstart.build_progress import BuildProgress
from sbtiny.config import DataSettings, Settings
from sbtiny.errors import InputError
from sbtiny.models.prompt import check_texts, find_token, special_tokens
from sbtiny.progress import bar
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question, digest_items
from sbtiny.tasks.traces import Trace
from sbtiny.tasks.verify import Verifier, user_file


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Labelled rows and counts of what was dropped. `cut`: answers at the token limit; `leaked`: evaluation questions; `spare`: correct
    answers over `data.rows_per_question`. `turn_ends`: answers that lost a turn end and were not dropped."""

    rows: list[dict[str, Any]]
    sampled: int
    cut: int
    wrong: int
    leaked: int = 0
    spare: int = 0
    turn_ends: int = 0
    asked: dict[int | None, int] = field(default_factory=dict)  # answers by level
    right: dict[int | None, int] = field(default_factory=dict)  # correct answers by level

    def levels(self) -> list[dict[str, Any]]:
        """By level, and over all: rows, share of answers accepted, percentiles of the rows' tokens."""
        levels = sorted(self.asked, key=lambda level: (level is None, level))
        groups = [(level, [r for r in self.rows if r["level"] == level], self.right.get(level, 0), self.asked[level]) for level in levels]
        overall = ("all", self.rows, sum(self.right.values()), self.sampled)
        return [
            {"level": level, "rows": len(rows), "accepted": round(right / answers, 4)} | length_percentiles([r["budget"] for r in rows])
            for level, rows, right, answers in [*groups, overall]
        ]


def length_percentiles(lengths: Sequence[int]) -> dict[str, float | None]:
    points = (10, 50, 90, 100)
    values = np.percentile(lengths, points).tolist() if lengths else [None] * len(points)
    return {f"p{point}": value for point, value in zip(points, values, strict=True)}


def build_requests(policy: Policy, questions: Sequence[Question], data: DataSettings, seed: int) -> list[Request]:
    """`data.samples_per_question` requests for each question, in order; a seed depends on the place alone."""
    return [
        policy.request(
            question.question, data.max_tokens, seed=seed * 1_000_003 + number * data.samples_per_question + copy, system=question.system
        )
        for number, question in enumerate(questions)
        for copy in range(data.samples_per_question)
    ]


def sample_answers(
    policy: Policy, requests: Sequence[Request], temperature: float, on_episode: Callable[[int, Episode], None]
) -> list[Episode]:
    """Sample the answers, in order, with a progress bar. Calls `on_episode` with place and answer as each ends."""
    started, tokens = time.perf_counter(), 0
    with bar("sampling own answers", len(requests)) as advance:

        def count(index: int, episode: Episode) -> None:
            nonlocal tokens
            tokens += len(episode.completion_ids)
            on_episode(index, episode)
            advance(note=f"{tokens / (time.perf_counter() - started):.0f} tok/s")

        return policy.sample(requests, Sampling(temperature=temperature), count)


def sample_correct(policy: Policy, questions: Sequence[Question], verify: Verifier, settings: Settings, file: Path) -> BuildResult:
    """Sample answers and label the correct ones. Answers in `file`.part are not sampled again.

    Raises InputError if no answer is correct.
    """
    data = settings.data
    requests = build_requests(policy, questions, data, settings.seed)
    question_of = [question for question in questions for _ in range(data.samples_per_question)]
    progress = BuildProgress(file, build_signature(settings, questions))
    todo = [i for i in range(len(requests)) if i not in progress.done]
    special = special_tokens(policy.tokenizer)

    def label(index: int, episode: Episode) -> None:
        answer = todo[index]
        try:
            kind = classify_answer(episode, question_of[answer], verify)
            if find_token(episode.solution, special):  # no text can be trained to write a special token in the middle
                kind = "cut" if kind == "cut" else "wrong"
        except InputError:  # of the verifier: its earlier verdicts cannot be trusted
            progress.discard()
            raise
        progress.add(answer, kind, make_row(policy, question_of[answer], episode.solution) if kind == "row" else None)

    if todo:
        sample_answers(policy, [requests[i] for i in todo], data.temperature, label)
    lines = [progress.done[i] for i in range(len(requests))]
    right = [line["row"] for line in lines if line["row"]]
    rows = select_by_length(right, data.rows_per_question)
    cut, wrong = (sum(line["kind"] == kind for line in lines) for kind in ("cut", "wrong"))
    if not rows:
        progress.remove()  # a build with other settings could not resume from it
        raise no_correct_answer_error(settings, questions[0], len(lines), wrong, cut)
    counts = {"asked": count_by_level(question_of), "right": count_by_level(right)}
    return BuildResult(rows, len(lines), cut, wrong, spare=len(right) - len(rows), **counts)


def no_correct_answer_error(settings: Settings, first: Question, answers: int, wrong: int, cut: int) -> InputError:
    data = settings.data
    what = f"no usable answer in {answers} of {settings.model} to {data.task}: {wrong} wrong, {cut} cut at {data.max_tokens} tokens"
    why = f"the first question is {first.location} with the answer {first.answer[:40]!r}, checked by {data.verifier}"
    hint = "raise data.max_tokens" if cut > wrong else "give easier questions, a better --model or another --verifier"
    return InputError(f"{what}; {why}: {hint}")


def build_signature(settings: Settings, questions: Sequence[Question]) -> str:
    """A hash of all that answers and verdicts depend on; not of `max_num_seqs`, nor of the questions' file."""
    d, s = settings.data, settings
    model = (s.model, s.seed, s.format, s.four_bit, s.backend, s.engine)
    facts = (model, d.samples_per_question, d.temperature, d.max_tokens, d.verifier, user_file(d.verifier), digest_items(questions))
    return blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def classify_answer(episode: Episode, question: Question, verify: Verifier) -> str:
    """`row` for a correct, plain answer, `cut` for one that did not end, else `wrong`."""
    if episode.stop_reason != "end":
        return "cut"
    usable = episode.solution.strip() and not find_tag(episode.solution)
    return "row" if usable and verify(episode.solution, question) else "wrong"


def find_tag(response: str) -> str:
    """What keeps an answer from being read back in some format, such as a tag in it; empty if nothing does."""
    try:
        for form in FORMATS.values():
            split_response(response, form)
    except ValueError as error:
        return str(error)
    return ""


def select_by_length(rows: list[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    """Keep at most `keep` rows of each question: the shortest, the longest, and evenly between; 0 keeps all.

    With two rows of different length only the budget explains the difference, so the model must read it.
    """
    if not keep:
        return rows
    lengths: dict[str, dict[int, int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(row["id"], {}).setdefault(row["budget"], i)
    chosen: set[int] = set()
    for by_length in lengths.values():
        order = [by_length[length] for length in sorted(by_length)]
        chosen |= {order[round(n * (len(order) - 1) / max(1, keep - 1))] for n in range(keep)}
    return [row for i, row in enumerate(rows) if i in chosen]


def count_by_level(items: Sequence[Question | Trace | dict[str, Any]]) -> dict[int | None, int]:
    levels = [item["level"] if isinstance(item, dict) else item.level for item in items]
    return {level: levels.count(level) for level in dict.fromkeys(levels)}


def make_row(policy: Policy, question: Question | Trace, response: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "answer": question.answer,
        "level": question.level,
        "response": response,
        "budget": len(policy.encode(response)),
    } | ({"system": question.system} if question.system else {})


def label_traces(policy: Policy, traces: Sequence[Trace], verify: Verifier, keep: int) -> BuildResult:
    """Rows from traces that finished and are correct: as published, or verified if that is unknown.

    All answers to a question get the id of its first, as the model's own answers have. Raises InputError if no trace is usable.
    """
    unordered, cut, wrong = [], 0, 0
    ids: dict[tuple[str, str | None], str] = {}
    for trace in traces:
        if not trace.finished:
            cut += 1
        elif not (verify(trace.response, trace) if trace.correct is None else trace.correct):
            wrong += 1
        elif fault := find_tag(trace.response):
            raise InputError(f"{trace.location}: {fault}: give the plain answers")
        else:
            check_texts(policy.tokenizer, [trace])
            unordered.append(make_row(policy, trace, trace.response) | {"id": ids.setdefault((trace.question, trace.system), trace.id)})
    places = {name: place for place, name in enumerate(ids.values())}
    right = sorted(unordered, key=lambda row: places[row["id"]])  # a question's rows side by side, for one update
    rows = select_by_length(right, keep)
    if not rows:
        first = traces[0]
        why = f"the first is {first.location} with the answer {first.answer[:40]!r}"
        raise InputError(f"no usable trace in {len(traces)}: {wrong} wrong, {cut} unfinished; {why}: check the answers, or --verifier")
    counts = {"turn_ends": sum(t.ended for t in traces), "asked": count_by_level(traces), "right": count_by_level(right)}
    return BuildResult(rows, len(traces), cut, wrong, spare=len(right) - len(rows), **counts)
