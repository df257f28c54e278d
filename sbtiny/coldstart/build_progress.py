"""What a build of cold-start data has sampled so far, in `<file>.part` beside the file it will become."""

from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.errors import InputError
from sbtiny.progress import console
from sbtiny.tasks.sources import Row, read_rows


class Partial:
    """One line an answer, in the order they ended; nothing is written before the first.

    Its first line says what was asked, so that a build of other settings does not go on with it.
    """

    def __init__(self, file: Path, of: str) -> None:
        self.path, self.of = file.with_name(f"{file.name}.part"), of
        first, *found = whole_rows(self.path) or [{"of": of}]
        if first.get("of") != of:
            mend = "remove it, or give those again"
            raise InputError(f"{self.path} was begun with other settings, model, verifier or questions: {mend}")
        self.done: dict[int, dict[str, Any]] = {line["answer"]: line for line in found}
        self.earlier = len(found)
        if found:
            console.print(f"going on with {self.path}: {len(found)} answers are there")

    def add(self, answer: int, kind: str, row: dict[str, Any] | None) -> None:
        if not self.done:
            runs.write_jsonl(self.path, [{"of": self.of}])
        self.done[answer] = {"answer": answer, "kind": kind, "row": row}
        runs.append_jsonl(self.path, self.done[answer])

    def discard(self) -> None:
        """After wrong input; answers of an earlier start, perhaps hours of them, are the user's to remove."""
        if not self.earlier:
            self.remove()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def whole_rows(path: Path) -> list[Row]:
    """The rows of it, if any; a last line without an end, as a crash leaves it, is cut off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read_rows(str(path)) if whole else []
