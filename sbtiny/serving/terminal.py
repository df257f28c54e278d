"""A chat in a terminal: text as it comes, a live line of budget and seconds below it, Ctrl-C as "answer now"."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sbtiny.budget.calibration import Calibration
from sbtiny.budget.seconds import SecondsLeft
from sbtiny.budget.stream import Part, PartKind
from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.serving.ask import AUTO, Answer, Ask, Progress, describe_answer
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.chat import Action, Chat
from sbtiny.serving.reply import Reply

SMALL_SHARE = 0.5  # of the least budget stated; the 0.5B model's answers to 20 to 60 tokens break, its least is 120 (LOG 43)
FRAME = 1 / 12  # seconds between two pictures
HISTORY = Path(expand_home(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "sbtiny" / "chat_history"
STYLES: dict[PartKind, str] = {"thoughts": "dim", "answer": ""}  # dim is grey on light and on dark
FENCE = '"""'
SOURCES = {"given": "given", "seconds": "given", "scaled": "given", "coverage": "stated", "stated": "stated", "none": ""}


# ---- one line ----------------------------------------------------------------------------------------------------------------------


def describe_seconds(left: SecondsLeft | None) -> str:
    """`3 s left (2 to 5)`; "" where it is not known."""
    if left is None:
        return ""
    digits = 1 if left.seconds < 10 else 0
    high = "?" if left.high is None else f"{left.high:.{digits}f}"
    return f"{left.seconds:.{digits}f} s left ({left.low:.{digits}f} to {high})"


def describe_progress(reply: Reply) -> str:
    """The live line: `stated 120 · used 84 · 3 s left (2 to 5)`."""
    at: Progress = reply.progress()
    if reply.interrupt.presses:
        return " · ".join(filter(None, ["answering now", f"used {at.used}", describe_seconds(at.seconds)]))
    budget = f"{SOURCES[reply.source]} {at.budget}" if at.budget else "no budget yet" if reply.awaits_budget else "no budget"
    left = f"over by {100 * at.over:.0f} %" if at.over > 0 else describe_seconds(at.seconds)
    return " · ".join(filter(None, [budget, f"used {at.used}", left]))


# ---- one answer --------------------------------------------------------------------------------------------------------------------


class AnswerView:
    """Shows the parts of one answer. Whole lines are printed for good; the line that grows and the live line below it are redrawn."""

    def __init__(self, console: Console, show_thoughts: bool) -> None:
        self.console, self.show_thoughts = console, show_thoughts
        self.line, self.kind = Text(), None
        self.live: Live | None = None

    def add(self, part: Part) -> None:
        if part.kind == "thoughts" and not self.show_thoughts:
            return
        if self.kind not in (None, part.kind):
            self._print(self.line)
            self.line = Text()
        self.kind = part.kind
        *whole, rest = part.text.split("\n")
        for text in whole:
            self._print(self.line.append(text, STYLES[part.kind]))
            self.line = Text()
        self.line.append(rest, STYLES[part.kind])
        rows = self.line.wrap(self.console, self.console.width)
        for row in rows[:-1]:  # a paragraph may be taller than the screen
            self._print(row)
        self.line = rows[-1] if rows else Text()

    def _print(self, line: Text) -> None:
        self.console.print(line, highlight=False)

    def draw(self, status: str) -> None:
        below = Text(status, style="dim", no_wrap=True, overflow="ellipsis")
        self.live.update(Group(self.line, below) if self.line else below, refresh=True)

    @contextmanager
    def showing(self) -> Iterator[None]:
        with Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False) as self.live:
            yield
        if self.line:
            self._print(self.line)


def describe_reply(reply: Reply, calibration: Calibration | None) -> str:
    """The figures of a finished reply, and a line more where a user's budget is far below all that the model stated in calibrating."""
    figures, least = describe_answer(reply.answer), calibration and calibration.least_stated
    if reply.ask.choice.mode == "auto" or reply.given is None or least is None or reply.given >= SMALL_SHARE * least:
        return figures
    return f"{figures}\na budget of {reply.given} is far below what this model states ({least} and more): its answers may break there"


def show_reply(reply: Reply, console: Console, show_thoughts: bool, calibration: Calibration | None) -> Answer:
    """Decode an answer and show it as it comes; `calibration` is the model's."""
    view, drawn = AnswerView(console, show_thoughts), 0.0
    with view.showing():
        for part in with_steps(reply):
            if part is not None:
                view.add(part)
            if (now := time.perf_counter()) - drawn > FRAME:
                view.draw(describe_progress(reply))
                drawn = now
    console.print(Text(describe_reply(reply, calibration), style="dim"), highlight=False)
    return reply.answer


def with_steps(reply: Reply) -> Iterator[Part | None]:
    """The parts of a reply, and None after each step."""
    seen = 0
    while not reply.is_done:
        reply.step()
        yield None
        yield from reply.parts[seen:]
        seen = len(reply.parts)
    if reply.refusal is not None:
        raise reply.refusal


# ---- the chat ----------------------------------------------------------------------------------------------------------------------


class Terminal:
    """The loop of a chat. Ctrl-C never raises while a model decodes: it sets a flag that the decode loop reads once a step."""

    def __init__(self, assistant: Assistant, chat: Chat, console: Console, read: Callable[[str], str]) -> None:
        self.assistant, self.chat, self.console, self.read = assistant, chat, console, read
        self.reply: Reply | None = None
        self.pressed_early = False  # between the question and the beginning of its answer

    def run(self) -> None:
        """Read and answer until the user leaves."""
        with press_on_interrupt(self.press), leave_on_signals():
            while True:
                try:
                    line = self._read_question()
                    self.pressed_early = False
                    if line and not self._handle(line):
                        return
                except EOFError:
                    return
                except KeyboardInterrupt:  # prompt_toolkit's, at the prompt alone
                    self._say("Ctrl-D or /exit leaves; while it thinks, Ctrl-C means: answer now")
                except InputError as error:
                    self._say(f"error: {error}", "red")

    def press(self) -> None:
        if self.reply is None:
            self.pressed_early = True
        else:
            self.reply.press()

    def _say(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(text, style=style), highlight=False)

    def _read_question(self) -> str:
        """A line, or the lines between two fences."""
        line = self.read(">>> ").strip()
        if not line.startswith(FENCE):
            return line
        lines = [line.removeprefix(FENCE)]
        while FENCE not in lines[-1]:
            lines.append(self.read("... "))
        return "\n".join([*lines[:-1], lines[-1].partition(FENCE)[0]]).strip()

    def _handle(self, line: str) -> bool:
        """Do what a line says. False when the user leaves. What cannot be done leaves the turns as they were."""
        turns = list(self.chat.turns)
        try:
            match self.chat.handle(line):
                case Action.EXIT:
                    return False
                case Action.ASK:
                    self.chat.take_answer(self._answer(self.chat.ask))
                case Action.COMPARE:
                    self._compare()
                case str(text):
                    self._say(text)
        except InputError:
            self.chat.turns = turns
            raise
        return True

    def _answer(self, ask: Ask) -> Answer:
        try:
            self.reply = self.assistant.begin(self.chat.messages, ask)
            if self.pressed_early:
                self.reply.press()
            return show_reply(self.reply, self.console, self.chat.show_thoughts, self.assistant.calibration)
        finally:
            self.reply = None

    def _compare(self) -> None:
        self.assistant.check_base_model()
        self._say("with a budget:")
        ours = self._answer(self.chat.ask)
        with self.assistant.base_model():
            self._say("the base model, without one:")
            base = self._answer(replace(self.chat.ask, choice=AUTO, coverage=None))
        self.chat.take_answer(ours)
        if base.tokens:
            self._say(f"{ours.tokens} tokens in place of {base.tokens}: {1 - ours.tokens / base.tokens:.0%} fewer")


@contextmanager
def press_on_interrupt(press: Callable[[], None]) -> Iterator[None]:
    """Call `press` at every Ctrl-C, in place of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda *_: press())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """Leave at SIGTERM or SIGHUP with a shell's code for it (143, 129), by way of all that puts the terminal back as it was."""
    code = 0

    def leave(number: int, _: object) -> None:
        nonlocal code
        if code:  # a second signal would stop the way out
            return
        code = 128 + number
        with suppress(RuntimeError):  # no loop runs
            asyncio.get_running_loop().call_soon_threadsafe(sys.exit, code)  # at the prompt: an exception amid its loop could be lost
            return
        sys.exit(code)

    before = {getattr(signal, name): None for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)}  # Windows has no SIGHUP
    for number in before:
        before[number] = signal.signal(number, leave)
    try:
        yield
    except OSError:  # a closed terminal takes nothing of what is written on the way out
        if not code:
            raise
        raise SystemExit(code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_reader(history: Path = HISTORY) -> Callable[[str], str]:
    """Read lines with editing and a history in a file; in memory, with a line that says so, where the file cannot be written."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    kept: Any = FileHistory(str(history))
    try:
        if not history.is_absolute():
            raise OSError(f"{history.parent} is no absolute path")  # of a user without a home folder
        history.parent.mkdir(parents=True, exist_ok=True)
        history.open("a", encoding="utf-8").close()
    except OSError as error:
        Console(stderr=True).print(f"no history is kept: {error}", markup=False)
        kept = InMemoryHistory()
    keys = KeyBindings()
    keys.add(Keys.Vt100MouseEvent)(lambda _: None)  # no mouse is used here, and prompt_toolkit raises for reports that it does not know
    session: PromptSession[str] = PromptSession(history=kept, key_bindings=keys)
    return lambda prompt: session.prompt(prompt, handle_sigint=False)


def answer_once(assistant: Assistant, chat: Chat, question: str, quiet: bool = False) -> Answer:
    """Answer one question: the answer on stdout, thoughts and figures on stderr. `quiet`: nothing on either."""
    if not question:
        raise InputError("an empty question: give one as an argument or on a pipe")
    chat.handle_question(question)
    reply = assistant.begin(chat.messages, chat.ask)
    errors, out = Console(stderr=True, highlight=False), Console(highlight=False)
    with press_on_interrupt(reply.press), leave_on_signals():
        if errors.is_terminal and out.is_terminal and not quiet:
            return show_reply(reply, out, chat.show_thoughts, assistant.calibration)
        for part in reply:
            if part.kind == "answer" and not quiet:
                print(part.text, end="", flush=True)
            elif chat.show_thoughts and not quiet:
                print(part.text, end="", file=sys.stderr, flush=True)
    if not quiet:
        print()
        print(describe_reply(reply, assistant.calibration), file=sys.stderr)
    return reply.answer
