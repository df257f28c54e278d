"""Cold-start data: the model's own correct answers, each labelled with its own token count (paper section 2).

A row is one line of JSON: `id, question, answer, level, response, budget, asked_with`; `budget` counts the tokens of `response`,
`asked_with` is the instruction and the system turn that it was sampled with.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from sbtiny import runs
from sbtiny.budget.protocol import FORMATS, split_response
from sbtiny.config import DataSettings, Settings
from sbtiny.errors import InputError
from sbtiny.models.aliases import fill_prompt
from sbtiny.models.prompt import find_token, special_tokens
from sbtiny.progress import bar, print_line
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.rollout.max_tokens import choose_max_tokens
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.row_files import Row
from sbtiny.tasks.sources import Question, digest_items, read_rows
from sbtiny.tasks.verify import Verifier, user_file

PERCENTILES = (10, 50, 90, 100)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Labelled rows and counts of what was dropped. `cut`: answers at the token limit; `leaked`: evaluation questions; `spare`: correct
    answers over `data.rows_per_question`. `turn_ends`: answers that lost a turn end and were not dropped."""

    rows: list[Row]
    sampled: int
    cut: int
    wrong: int
    leaked: int = 0
    spare: int = 0
    turn_ends: int = 0
    max_tokens: int = 0  # most tokens of an answer; 0 for traces
    asked: Counter[int | None] = field(default_factory=Counter)  # answers by level
    right: Counter[int | None] = field(default_factory=Counter)  # correct answers by level
    lengths: dict[str, list[int]] = field(default_factory=dict)  # tokens of all answers that ended, by question id

    @classmethod
    def of(
        cls, asked: Sequence[Question], kinds: Sequence[str], tokens: Sequence[int | None], right: list[Row], keep: int
    ) -> "BuildResult":
        """Count the answers to `asked`, and keep `keep` of the `right` rows of each question.

        An answer has one of `kinds`, and `tokens`, None of one that did not end.
        """
        rows, levels = select_by_length(right, keep), Counter(question.level for question in asked)
        counts = {"spare": len(right) - len(rows), "asked": levels, "right": Counter(row["level"] for row in right)}
        lengths: dict[str, list[int]] = {}
        for question, count in zip(asked, tokens, strict=True):
            if count:
                lengths.setdefault(question.id, []).append(count)
        return cls(rows, len(kinds), kinds.count("cut"), kinds.count("wrong"), lengths=lengths, **counts)

    def levels(self) -> list[Row]:
        """By level, and over all: rows, share of answers accepted, percentiles of the rows' tokens."""
        found = []
        for level in [*sorted(self.asked, key=lambda level: (level is None, level)), "all"]:
            rows = [row for row in self.rows if level in ("all", row["level"]) and row["response"] is not None]
            right, asked = (self.right.total(), self.sampled) if level == "all" else (self.right[level], self.asked[level])
            lengths = np.percentile([row["budget"] for row in rows], PERCENTILES).tolist() if rows else [None] * len(PERCENTILES)
            by_point = {f"p{point}": length for point, length in zip(PERCENTILES, lengths, strict=True)}
            found.append({"level": level, "rows": len(rows), "accepted": round(right / asked, 4)} | by_point)
        return found


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
    """Sample answers and label the correct ones. Answers in `file`.part are not sampled again, and are as long as its others may be.

    Raises InputError if no answer is correct.
    """
    progress, data = BuildProgress(file, build_signature(settings, questions)), settings.data
    if progress.resumed:
        print_line(f"resuming from {progress.path}: {len(progress.done)} answers are there")
    if progress.max_tokens is None:
        sampling = Sampling(temperature=data.temperature)
        progress.max_tokens = choose_max_tokens(data.max_tokens, policy, questions, sampling, settings.seed)
    data = replace(data, max_tokens=progress.max_tokens)
    settings = replace(settings, data=data)
    requests = build_requests(policy, questions, data, settings.seed)
    question_of = [question for question in questions for _ in range(data.samples_per_question)]
    todo = [i for i in range(len(requests)) if i not in progress.done]
    special = special_tokens(policy.tokenizer)

    def label(index: int, episode: Episode) -> None:
        answer = todo[index]
        try:
            kind = classify_answer(episode, question_of[answer], verify, special)
        except InputError:  # of the verifier: its verdicts cannot be trusted; the user may want those of an earlier start
            if not progress.resumed:
                progress.path.unlink(missing_ok=True)
            raise
        row = make_row(policy, question_of[answer], episode.solution) | {"asked_with": asdict(policy.asked_with)}
        progress.add(answer, kind, None if kind == "cut" else row["budget"], row if kind == "row" else None)

    if todo:
        sample_answers(policy, [requests[i] for i in todo], data.temperature, label)
    lines = [progress.done[i] for i in range(len(requests))]
    right = [line["row"] for line in lines if line["row"]]
    tokens = [line["row"]["budget"] if line["row"] else line.get("tokens") for line in lines]  # an older .part has none of wrong ones
    result = BuildResult.of(question_of, [line["kind"] for line in lines], tokens, right, data.rows_per_question)
    result = replace(result, max_tokens=data.max_tokens)
    if not result.rows:
        progress.path.unlink(missing_ok=True)  # a build with other settings could not resume from it
        raise no_correct_answer_error(settings, questions[0], result)
    return result


def no_correct_answer_error(settings: Settings, first: Question, result: BuildResult) -> InputError:
    data, counts = settings.data, f"{result.wrong} wrong, {result.cut} cut at {settings.data.max_tokens} tokens"
    what = f"no usable answer in {result.sampled} of {settings.model} to {data.task}: {counts}"
    why = f"the first question is {first.location} with the answer {first.answer[:40]!r}, checked by {data.verifier}"
    hint = "raise data.max_tokens" if result.cut > result.wrong else "give easier questions, a better --model or another --verifier"
    return InputError(f"{what}; {why}: {hint}")


class BuildProgress:
    """The answers sampled so far, in `<file>.part`: one line an answer. `done` maps its place among the requests to its line.

    The first line is the build's signature, written with the first answer: a build of other settings must not resume from it. Beside it
    stands the most tokens of an answer, a number also where a probe chose it.
    """

    def __init__(self, file: Path, signature: str) -> None:
        self.path, self.signature = progress_file(file), signature
        first, *lines = read_whole_rows(self.path) or [{"of": signature}]
        self.max_tokens: int | None = first.get("max_tokens")
        if first.get("of") != signature:
            hint = "remove it, or give those again"
            raise InputError(f"{self.path} was begun with other settings, model, verifier or questions: {hint}")
        self.done: dict[int, Row] = {line["answer"]: line for line in lines}
        self.resumed = bool(lines)

    def add(self, answer: int, kind: str, tokens: int | None, row: Row | None) -> None:
        if not self.done:
            runs.write_jsonl(self.path, [{"of": self.signature, "max_tokens": self.max_tokens}])
        self.done[answer] = {"answer": answer, "kind": kind, "tokens": tokens, "row": row}
        runs.append_jsonl(self.path, self.done[answer])


def progress_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def read_whole_rows(path: Path) -> list[Row]:
    """The rows of the file, none without one. Cuts off a last line without an end, which a crash leaves."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read_rows(str(path)) if whole else []


def build_signature(settings: Settings, questions: Sequence[Question]) -> str:
    """A hash of all that answers and verdicts depend on; not of `max_num_seqs`, nor of the questions' file."""
    d, s = settings.data, settings
    model = (s.model, s.seed, s.format, s.four_bit, s.backend, s.engine, fill_prompt(s.prompt, s.model).without_empty())
    facts = (model, d.samples_per_question, d.temperature, d.max_tokens, d.verifier, user_file(d.verifier), digest_items(questions))
    return blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def classify_answer(episode: Episode, question: Question, verify: Verifier, special: Sequence[str]) -> str:
    """`row` for a correct, plain answer, `cut` for one that did not end, else `wrong`.

    `special`: the tokenizer's special tokens; no text can be trained to write one in the middle.
    """
    if episode.stop_reason != "end":
        return "cut"
    usable = episode.solution.strip() and not find_tag(episode.solution) and not find_token(episode.solution, special)
    return "row" if usable and verify(episode.solution, question) else "wrong"


def find_tag(response: str) -> str:
    """What keeps an answer from being read back in some format, such as a tag in it; empty if nothing does."""
    try:
        for form in FORMATS.values():
            split_response(response, form)
    except ValueError as error:
        return str(error)
    return ""


def select_by_length(rows: list[Row], keep: int) -> list[Row]:
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


def make_row(policy: Policy, question: Question, response: str) -> Row:
    return fill_row(question, response, len(policy.encode(response)))


def fill_row(question: Question, response: str | None, budget: int) -> Row:
    """A labelled row; without a response it teaches the budget alone."""
    row = {"id": question.id, "question": question.question, "answer": question.answer, "level": question.level}
    return row | {"response": response, "budget": budget} | ({"system": question.system} if question.system else {})
