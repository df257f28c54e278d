"""Traces: answers of other models, in any common shape of rows."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sbtiny.errors import InputError
from sbtiny.tasks.answers import marked_answer, without_turn_end
from sbtiny.tasks.fields import read_flag, read_text
from sbtiny.tasks.row_files import Row, format_row_location
from sbtiny.tasks.row_shapes import read_row
from sbtiny.tasks.sources import Question, build_question, file_stem, numbered_rows


@dataclass(frozen=True, slots=True)
class Trace(Question):
    """A question with a recorded response. `correct` is None where unknown; `finished` is False when it was cut at a limit.

    `ended`: the response had a turn end, which was removed.
    """

    response: str = ""
    correct: bool | None = None
    finished: bool = True
    ended: bool = False


def unverified_questions(traces: Iterable[Trace]) -> list[Trace]:
    """List the finished traces whose correctness is unknown."""
    return [trace for trace in traces if trace.finished and trace.correct is None]


def read_traces(path: str) -> list[Trace]:
    """Read the traces of a file: question, answer, response; optionally correct, finished, level and id.

    By default `correct` is unknown and `finished` true. Rows of other shapes (`row_shapes.py`) are examples to learn from:
    without an `answer`, their own is the reference and correct by default.
    """
    traces = [to_trace(row, format_row_location(path, number), f"{file_stem(path)}-{number:05d}") for number, row in numbered_rows(path)]
    question_by_id: dict[str, str] = {}
    for trace in traces:
        if question_by_id.setdefault(trace.id, trace.question) != trace.question:
            raise InputError(f"{trace.where}: an earlier row has the id {trace.id!r} and another question: give each question its own")
    return traces


def to_trace(row: Row, where: str, default_id: str) -> Trace:
    example = read_row(row, where, single=True)
    response = without_turn_end(example.response or read_text(row, "response", where))
    if not response:
        raise InputError(f"{where}: {example.key!r} is nothing but the end of a turn: give an answer, or drop the row")
    correct, finished = (read_flag(row, key, where) for key in ("correct", "finished"))
    given = example.answer
    if given is None:
        if example.key == "response":  # a sampled answer may be wrong
            given = read_text(row, "answer", where)
        else:
            given, correct = marked_answer(example.spoken) or example.spoken or response, correct is not False
    question = build_question(row, example, given, where, default_id)
    ended = response != (example.response or "").rstrip()
    return Trace(**asdict(question), response=response, correct=correct, finished=finished is not False, ended=ended)
