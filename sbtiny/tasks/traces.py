"""Answers written elsewhere: JSON Lines with question, answer and response, with prompt and completion, or with messages."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from sbtiny.errors import InputError
from sbtiny.tasks.answers import given_answer
from sbtiny.tasks.sources import Question, Row, last_exchange, numbered_rows, stem, text, to_question


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded response. `correct` is None where nobody said; `finished` is False when it was cut at a limit."""

    id: str
    question: str
    answer: str
    response: str
    correct: bool | None
    finished: bool
    level: int | None
    where: str = field(default="", compare=False, repr=False)

    def asked(self) -> Question:
        return Question(self.id, self.question, self.answer, self.level, where=self.where)


def unjudged(traces: Iterable[Trace]) -> list[Question]:
    """What a verifier will have to decide on."""
    return [trace.asked() for trace in traces if trace.finished and trace.correct is None]


def read_traces(path: str) -> list[Trace]:
    """The traces of a file: question, answer, response; if known, correct, finished, level and id.

    `correct` is unknown and `finished` is true unless told. Rows of prompt and completion, or of messages, are examples to
    learn from: without an `answer`, the one that they give is the reference, and right unless told.
    """
    traces = [to_trace(row, f"{path}, line {number}", f"{stem(path)}-{number:05d}") for number, row in numbered_rows(path)]
    asked: dict[str, str] = {}
    for trace in traces:
        if asked.setdefault(trace.id, trace.question) != trace.question:
            raise InputError(f"{trace.where}: an earlier row has the id {trace.id!r} and another question: give each question its own")
    return traces


def to_trace(row: Row, where: str, default_id: str) -> Trace:
    if "response" not in row:
        row = from_example(row, where)
    known = to_question(row, where, default_id)
    correct, finished = (flag(row, key, where) for key in ("correct", "finished"))
    told = (text(row, "response", where), correct, finished is not False)
    return Trace(known.id, known.question, known.answer, *told, known.level, where)


def from_example(row: Row, where: str) -> Row:
    """A row of messages or of prompt and completion, as one of question, answer and response; any other as it is."""
    if "messages" in row:
        question, replies, earlier = last_exchange(row, where)
        if earlier or not replies:
            raise InputError(f"{where}: 'messages' must be one user turn and the assistant's after it: one question, one answer")
        found = {"question": question, "response": text(replies[-1], "content", where)}
    elif {"prompt", "completion"} <= row.keys():
        found = {"question": text(row, "prompt", where), "response": text(row, "completion", where)}
    else:
        return row
    if row.get("answer") is None:
        found |= {"answer": given_answer(found["response"]) or found["response"], "correct": row.get("correct") is not False}
    return {key: value for key, value in row.items() if key != "messages"} | found


def flag(row: Row, key: str, where: str) -> bool | None:
    value = row.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}: it must be true, false or null")
    return value
