"""Answers written elsewhere, in any common shape of rows."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sbtiny.errors import InputError
from sbtiny.tasks.answers import given_answer, without_turn_end
from sbtiny.tasks.row_files import Row, locate
from sbtiny.tasks.row_shapes import read_row, shown, text
from sbtiny.tasks.sources import Question, numbered_rows, question_of, stem


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded response. `correct` is None where nobody said; `finished` is False when it was cut at a limit.

    `ended`: the response came with a turn end, which is no part of it any more.
    """

    id: str
    question: str
    answer: str
    response: str
    correct: bool | None
    finished: bool
    level: int | None
    where: str = field(default="", compare=False, repr=False)
    system: str | None = None
    ended: bool = False

    @property
    def named(self) -> str:
        return self.asked().named

    def asked(self) -> Question:
        return Question(self.id, self.question, self.answer, self.level, where=self.where, system=self.system)


def unjudged(traces: Iterable[Trace]) -> list[Question]:
    """What a verifier will have to decide on."""
    return [trace.asked() for trace in traces if trace.finished and trace.correct is None]


def read_traces(path: str) -> list[Trace]:
    """The traces of a file: question, answer, response; if known, correct, finished, level and id.

    `correct` is unknown and `finished` is true unless told. Rows of the other shapes (`shapes.py`) are examples to
    learn from: without an `answer`, the one that they give is the reference, and right unless told.
    """
    traces = [to_trace(row, locate(path, number), f"{stem(path)}-{number:05d}") for number, row in numbered_rows(path)]
    asked: dict[str, str] = {}
    for trace in traces:
        if asked.setdefault(trace.id, trace.question) != trace.question:
            raise InputError(f"{trace.where}: an earlier row has the id {trace.id!r} and another question: give each question its own")
    return traces


def to_trace(row: Row, where: str, default_id: str) -> Trace:
    example = read_row(row, where, single=True)
    response = without_turn_end(example.response or text(row, "response", where))
    if not response:
        raise InputError(f"{where}: {example.key!r} is nothing but the end of a turn: give an answer, or drop the row")
    correct, finished = (flag(row, key, where) for key in ("correct", "finished"))
    given = example.answer
    if given is None:
        if example.key == "response":  # of an answer that was sampled nobody says that it is right
            given = text(row, "answer", where)
        else:
            given, correct = given_answer(example.spoken) or example.spoken or response, correct is not False
    known = question_of(row, example, given, where, default_id)
    ended = response != (example.response or "").rstrip()
    return Trace(
        known.id, known.question, known.answer, response, correct, finished is not False, known.level, where, known.system, ended
    )


def flag(row: Row, key: str, where: str) -> bool | None:
    value = row.get(key)
    if isinstance(value, str) and value.lower() in ("true", "false"):  # CSV has text alone
        return value.lower() == "true"
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}: {key!r} is {shown(value)}: it must be true, false or null")
    return value
