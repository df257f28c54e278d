"""The answers that a build of cold-start data has sampled so far, in `<file>.part` beside the file to be built."""

from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.sources import Row, read_rows


def progress_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


class BuildProgress:
    """One line an answer, in the order they ended. `done` maps the answer's place among the requests to its line.

    The first line is the build's signature, written with the first answer: a build of other settings must not resume from it.
    """

    def __init__(self, file: Path, signature: str) -> None:
        self.path, self.signature = progress_file(file), signature
        first, *lines = read_whole_rows(self.path) or [{"of": signature}]
        if first.get("of") != signature:
            hint = "remove it, or give those again"
            raise InputError(f"{self.path} was begun with other settings, model, verifier or questions: {hint}")
        self.done: dict[int, dict[str, Any]] = {line["answer"]: line for line in lines}
        self.earlier = len(lines)
        if lines:
            console.print(f"resuming from {self.path}: {len(lines)} answers are there")

    def add(self, answer: int, kind: str, row: dict[str, Any] | None) -> None:
        if not self.done:
            runs.write_jsonl(self.path, [{"of": self.signature}])
        self.done[answer] = {"answer": answer, "kind": kind, "row": row}
        runs.append_jsonl(self.path, self.done[answer])

    def discard(self) -> None:
        """Remove the file after wrong input, unless it holds answers of an earlier start: the user may want them."""
        if not self.earlier:
            self.remove()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_whole_rows(path: Path) -> list[Row]:
    """The rows of the file, none without one. Cuts off a last line without an end, which a crash leaves."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read_rows(str(path)) if whole else []
