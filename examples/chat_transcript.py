"""Hold a chat with a model in a real pseudo-terminal and draw it: python examples/chat_transcript.py runs/demo docs/chat.svg

Two questions may follow, which replace those of the bundled model's task. Needs pexpect and pyte.

The live line below an answer is redrawn in place and gone at the end; here some of its pictures stay, one
below another.
"""

import argparse
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.text import Text

PROMPT = ">>>"
LEFT_PROMPT = "\x1b[?2004l"  # prompt_toolkit ends bracketed paste as it leaves a prompt
LIVE = re.compile(r"(?:stated \d+|given \d+|answering now|no budget(?: yet)?) · used \d+(?![^\x1b\r\n]*tok/s)[^\x1b\r\n]*")
KEPT = 6  # pictures of an answer
FIGURES = re.compile(r"tok/s(?: · |$)")
QUESTIONS = (  # as the bundled model was trained on
    "Sam has 11 books.\na) finds 4\nb) gives 6\nc) drops 3\nd) wins 4\ne) loses 4\nf) gives 3\nHow many books?",
    "Leo has 63 books.\na) wins 8\nb) gets 2\nc) wins 7\nd) gives 7\ne) buys 5\nf) finds 2\ng) finds 5\nh) wins 2\nHow many books?",
)


class Recorder:
    """A chat in a terminal; `pictures` are the live lines of each answer."""

    def __init__(self, model: str, columns: int) -> None:
        environment = os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": tempfile.mkdtemp()}
        command = ["-m", "sbtiny", "chat", model]
        self.child = pexpect.spawn(sys.executable, command, dimensions=(50, columns), env=environment, encoding="utf-8")
        self.screen = pyte.HistoryScreen(columns, 50, history=2000)
        self.stream, self.pictures, self.written = pyte.Stream(self.screen), [], ""
        self.wait()

    def read(self) -> None:
        """Read what the chat wrote. The terminal's emulator knows no dim text: it becomes grey."""
        try:
            text = self.child.read_nonblocking(65536, 0.02)
        except pexpect.TIMEOUT:
            return
        self.written += text
        self.stream.feed(text.replace("\x1b[2m", "\x1b[90m"))

    @property
    def rows(self) -> list[Text]:
        """Every row so far, with its colours."""
        lines = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.screen.lines))]
        return [to_text(line, self.screen.columns) for line in lines]

    def wait(self, seconds: float = 600) -> None:
        """Read until the prompt is the last row."""
        end = time.monotonic() + seconds
        while not (shown := [row.plain for row in self.rows if row.plain]) or shown[-1] != PROMPT:
            if time.monotonic() > end:
                raise TimeoutError("no prompt came")
            self.read()

    def say(self, text: str, press_after: float | None = None) -> None:
        """Type the lines of a text; press Ctrl-C so many seconds after the live line came."""
        self.written = ""
        for count, line in enumerate(text.split("\n"), 1):
            self.child.send(line + "\r")
            while self.written.count(LEFT_PROMPT) < count:
                self.read()
        if press_after is not None:
            while not LIVE.search(self.written):
                self.read()
            time.sleep(press_after)
            self.read()
            if "tok/s" not in self.written:  # else it was too late, and a press leaves the prompt
                self.child.send("\x03")
        self.wait()
        if pictures := list(dict.fromkeys(LIVE.findall(self.written))):
            last = len(pictures) - 1
            self.pictures.append([pictures[i] for i in sorted({part * last // (KEPT - 1) for part in range(KEPT)})])


def to_text(line: dict, columns: int) -> Text:
    """One row of the emulator as text of rich."""
    text = Text()
    for x in range(columns):
        text.append(line[x].data, "dim" if line[x].fg == "brightblack" else "red" if line[x].fg == "red" else "")
    text.rstrip()
    return text


def hold_chat(recorder: Recorder, questions: Sequence[str]) -> list[Text]:
    """A question, again with twice the budget, again with an answer now, and a second turn.

    Returns the rows with the pictures among them.
    """
    first, second = (f'"""{question}"""' if "\n" in question else question for question in questions)
    recorder.say(first)
    recorder.say("/budget 2x")
    recorder.say("/regen")
    recorder.say("/budget 4x")
    recorder.say("/regen", press_after=0.06)
    recorder.say("/budget auto")
    recorder.say(second)
    recorder.say("/stats")
    pictures, rows = iter(recorder.pictures), []
    for row in recorder.rows:
        if FIGURES.search(row.plain) and not row.plain.lstrip().startswith(tuple("0123456789")):  # not that of /stats
            rows += [Text(f"  {picture}", "dim cyan") for picture in next(pictures)]
        rows.append(row)
    while rows and rows[-1].plain in ("", PROMPT):
        rows.pop()
    return rows


def draw(rows: list[Text], columns: int, title: str) -> str:
    """The rows as an SVG that loads nothing from elsewhere."""
    console = Console(record=True, width=columns, file=io.StringIO(), highlight=False)
    for row in rows:
        console.print(row)
    svg = console.export_svg(title=title)
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace, Menlo, Consolas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    args = parser.parse_args()
    columns = 92
    recorder = Recorder(args.model, columns)
    rows = hold_chat(recorder, args.questions)
    recorder.child.send("\x04")
    recorder.child.expect(pexpect.EOF)
    args.file.write_text(draw(rows, columns, f"sbtiny chat {Path(args.model).name}"), encoding="utf-8")
    print("\n".join(row.plain for row in rows))


if __name__ == "__main__":
    main()
