"""`sbtiny chat` in a pseudo-terminal, and on a pipe."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
from rich.console import Console

from sbtiny.budget.calibration import CalibrationAnswer, calibrate
from sbtiny.budget.seconds import SecondsLeft
from sbtiny.budget.stream import Part
from sbtiny.cli import main as cli
from sbtiny.config import ServeSettings
from sbtiny.rollout.load_policy import build_policy
from sbtiny.serving.ask import choose_budget
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.chat import Chat
from sbtiny.serving.terminal import AnswerView, Terminal, describe_progress, describe_reply, describe_seconds, make_reader
from sbtiny.tasks import arithmetic

SHORT = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2)
LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4).replace("\n", " ")
READY = ">>>"
TEXT = {"encoding": "utf-8", "codec_errors": "replace"}
LEFT_PROMPT = "\x1b[?2004l"  # prompt_toolkit ends bracketed paste as it leaves a prompt


class Screen:
    """A chat in a terminal of 60 columns, as a person sees it."""

    def __init__(self, model: str, state: Path, *options: str, columns: int = 60) -> None:
        environment = os.environ | {
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(state),
            "OMP_NUM_THREADS": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        command = ["-m", "sbtiny", "chat", model, "--set", "serve.temperature=0", *options]
        self.child = pexpect.spawn(sys.executable, command, dimensions=(40, columns), env=environment, timeout=120, **TEXT)
        self.screen = pyte.HistoryScreen(columns, 40, history=5000)
        self.stream, self.raw = pyte.Stream(self.screen), ""
        self.wait(READY)

    def read(self, seconds: float = 0.05) -> None:
        try:
            text = self.child.read_nonblocking(8192, seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += text
        self.stream.feed(text)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait(self, last: str, seconds: float = 120) -> None:
        """Read until this is the last line."""
        end = time.monotonic() + seconds
        while self.lines[-1:] != [last]:
            assert time.monotonic() < end, "\n".join(self.lines)
            self.read()

    def wait_for(self, text: str) -> None:
        """Read until this is anywhere on the screen."""
        end = time.monotonic() + 120
        while not any(text in line for line in self.lines):
            assert time.monotonic() < end, "\n".join(self.lines)
            self.read()

    def ask(self, text: str) -> None:
        """Send the lines of a text, each at a prompt, and read until the next prompt stands alone."""
        for line in text.split("\n"):
            self.begin(line)
        self.wait(READY)

    def begin(self, line: str, junk: bytes = b"") -> None:
        """Send a line, with more bytes in the same burst, and read until the prompt is left."""
        before, end = self.raw.count(LEFT_PROMPT), time.monotonic() + 120
        os.write(self.child.child_fd, line.encode() + b"\r" + junk)
        while self.raw.count(LEFT_PROMPT) == before:
            assert time.monotonic() < end, "\n".join(self.lines)
            self.read()

    def leave(self) -> int:
        self.child.send("\x04")
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def screen(started, tmp_path) -> Iterator[Screen]:
    chat = Screen(str(started), tmp_path)
    yield chat
    chat.child.close(force=True)


def test_a_chat_as_a_person_sees_it(screen: Screen, tmp_path: Path) -> None:
    screen.ask(f'"""{SHORT}"""')
    text = "\n".join(screen.lines)
    assert "\\boxed{" in text
    assert re.search(r"stated \d+ · used \d+ · [\d.]+ s · \d+ tok/s", text)
    assert "<budget>" not in text
    for line, shown in (
        ("/budget abc", "error: --budget 'abc' is not understood"),
        ("/budget 90%", "budget 90%"),
        ("/regen", "no promise without a calibration"),
        ("/budget 2x", "budget 2x"),
        ("/regen", "given "),
        ("/stats", "2 answers"),
        ("/system <|im_end|>", "system turn set"),
        ("/regen", "special token"),
        ("/nonsense", "is no command"),
    ):
        screen.ask(line)
        assert shown in "\n".join(screen.lines), line
    screen.child.send("\x03")
    screen.wait(READY)
    time.sleep(0.3)
    screen.read()
    assert "Ctrl-D or /exit leaves" in "\n".join(screen.lines)
    assert screen.leave() == 0
    assert "Traceback" not in screen.raw
    assert "+/budget abc" in (tmp_path / "sbtiny" / "chat_history").read_text()
    assert screen.raw.rindex("\x1b[?25h") > screen.raw.rindex("\x1b[?25l")  # the cursor is shown again


def press_at_random(screen: Screen, moments: int, rng: random.Random) -> None:
    """Ask, and press Ctrl-C at a random moment from the question to well after the answer: each time there is a prompt again."""
    for moment in range(moments):
        screen.child.send(LONG + "\r")
        end = time.monotonic() + rng.uniform(0, 0.8)
        while time.monotonic() < end:
            screen.read(0.01)
        screen.child.send("\x03")
        screen.wait(READY)
        screen.child.send(f"/set seed {moment}\r")  # it comes after the press, also where that only leaves a prompt
        while f"seed {moment}" not in screen.lines:
            assert time.monotonic() < end + 120, "\n".join(screen.lines)
            screen.read()
        screen.wait(READY)
    assert "Traceback" not in screen.raw
    assert screen.leave() == 0


def test_ctrl_c_at_random_moments(tmp_path: Path) -> None:
    press_at_random(Screen("tiny", tmp_path), 6, random.Random(0))


@pytest.mark.slow
def test_ctrl_c_at_200_random_moments(tmp_path: Path) -> None:
    press_at_random(Screen("tiny", tmp_path), 200, random.Random(1))
    questions = (tmp_path / "sbtiny" / "chat_history").read_text().count(f"+{LONG}")
    assert questions == 200


MOUSE = b"\x1b[M\xff\xfe\x80\x1b[<64;10;10M\x1b[<64;10M\x1b[M ab\x1b[;M"  # a wheel in three dialects, and two that are broken


def test_a_mouse_turned_while_it_thinks_is_not_heard(tmp_path: Path) -> None:
    screen = Screen("tiny", tmp_path)
    screen.begin(LONG, MOUSE)  # in one burst: prompt_toolkit keeps it for the next prompt
    screen.wait(READY)
    screen.begin(LONG)
    os.write(screen.child.child_fd, MOUSE)
    screen.wait(READY)
    assert "Traceback" not in screen.raw
    assert "Press ENTER" not in screen.raw
    assert screen.leave() == 0


@pytest.mark.parametrize("is_thinking", [False, True])
def test_a_signal_leaves_the_terminal_as_it_was(tmp_path: Path, is_thinking: bool) -> None:
    screen = Screen("tiny", tmp_path)
    if is_thinking:
        screen.begin(LONG)
        screen.wait_for("used")
    screen.child.kill(signal.SIGTERM)
    screen.child.expect(pexpect.EOF)
    screen.raw += screen.child.before
    assert screen.child.wait() == 143
    assert termios.tcgetattr(screen.child.child_fd)[3] & (termios.ECHO | termios.ICANON) == termios.ECHO | termios.ICANON
    assert "Traceback" not in screen.raw
    for shown, hidden in (("\x1b[?25h", "\x1b[?25l"), (LEFT_PROMPT, "\x1b[?2004h")):
        assert screen.raw.rindex(shown) > screen.raw.rindex(hidden)


@pytest.mark.parametrize("is_thinking", [False, True])
def test_a_terminal_that_is_closed_ends_the_chat(tmp_path: Path, is_thinking: bool) -> None:
    screen = Screen("tiny", tmp_path)
    if is_thinking:
        screen.begin(LONG)
        screen.wait_for("used")
    os.close(screen.child.child_fd)
    assert os.waitstatus_to_exitcode(os.waitpid(screen.child.pid, 0)[1]) == 129


Called = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture
def chat_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Runs `sbtiny chat` in this process, with these bytes on a pipe."""

    def call(*arguments: str, piped: bytes | None = b"") -> Called:
        monkeypatch.setattr(sys, "argv", ["sbtiny", "chat", *arguments])
        monkeypatch.setattr(sys, "stdin", None if piped is None else io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call


def test_a_question_on_a_pipe_is_answered_once(started: Path) -> None:
    command = [sys.executable, "-m", "sbtiny", "chat", str(started)]
    done = subprocess.run(command, input=SHORT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert done.stdout.strip().startswith("\\boxed{")
    assert done.stdout.count("\n") == 1
    assert re.search(r"stated \d+ · used", done.stderr)


def test_an_answer_as_json_and_wrong_input(started: Path, tmp_path: Path, chat_) -> None:
    code, out, _ = chat_(str(started), SHORT, "--json", "--budget", "5")
    asked = json.loads(out)
    assert (code, asked["given"], asked["source"]) == (0, 5, "given")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00")
    for arguments, piped, reason in (
        ((str(started),), b"", "an empty question"),
        ((str(started),), None, "an empty question"),
        ((str(started),), b"1 + \xff", "is not utf-8 at byte 4"),
        ((str(started), "1 + \udcff"), b"", "is not UTF-8 at character 4"),
        ((str(started), "1", "--budget", "90%"), b"", "no promise without a calibration"),
        ((str(started), "1", "--budget", "abc"), b"", "such as 90%"),
        (("nowhere", "1"), b"", "nowhere"),
        ((str(cut), "1"), b"", "not a readable GGUF file" if find_spec("gguf") else "gguf"),
    ):
        code, _, err = chat_(*arguments, piped=piped)
        assert (code, err.count("error:"), "Traceback" in err) == (2, 1, False), err
        assert reason in err


# ---- in this process ---------------------------------------------------------------------------------------------------------------


def shown(parts: list[Part], width: int, show_thoughts: bool = True) -> list[str]:
    """What stands on the screen after an answer of these parts, each drawn."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=24, highlight=False)
    view = AnswerView(console, show_thoughts)
    with view.showing():
        for part in parts:
            view.add(part)
            view.draw("stated 120 · used 84 · 3.0 s left (2.0 to 5.0)")
    screen = pyte.Screen(width, 60)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display if line.strip()]


@pytest.mark.parametrize("width", [60, 200])
@pytest.mark.parametrize("size", [1, 7, 400])
def test_lines_are_whole_at_any_width_and_the_live_line_is_gone(width: int, size: int) -> None:
    text = "Let me think about it. " * 20 + "\n\n" + "é😀 wide 漢字 " * 9 + "\nlast"
    parts = [Part("thoughts", text[i : i + size]) for i in range(0, len(text), size)] + [Part("answer", "42 [bold]is[/bold] it")]
    lines = shown(parts, width)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text + "42 [bold]is[/bold] it")
    assert lines[-1] == "42 [bold]is[/bold] it"
    assert not any("stated" in line for line in lines)
    assert shown(parts, width, show_thoughts=False) == ["42 [bold]is[/bold] it"]


def test_the_live_line_says_what_is_stated_used_and_left(tiny) -> None:
    assistant = Assistant(build_policy(*tiny, slots=2, states_budget=False), ServeSettings(temperature=0.0, context=512))
    reply = assistant.stream(LONG, budget=100)
    for _ in range(40):
        assistant.step_each()
    assert re.fullmatch(r"given 100 · used 40 · [\d.]+ s left \([\d.]+ to \?\)", describe_progress(reply))
    reply.press()
    assert describe_progress(reply).startswith("answering now · used 40")
    assert describe_seconds(SecondsLeft(2.96, 2.0, 5.04)) == "3.0 s left (2.0 to 5.0)"
    assert describe_seconds(SecondsLeft(30.4, 20, 50)) == "30 s left (20 to 50)"


def test_a_given_budget_far_below_all_that_was_stated_is_told(tiny) -> None:
    answers = [CalibrationAnswer(stated, stated) for stated in (120, 150, 200) for _ in range(20)]
    calibration = calibrate(answers, model_fingerprint="f", format="solution", task="t", split="val", temperature=0.6, top_p=0.95, date="d")
    assistant = Assistant(build_policy(*tiny, slots=2), ServeSettings(context=512), calibration)

    def warnings_of(temperature: float = 0.6, **asked: Any) -> list[str]:
        reply = assistant.begin(
            [{"role": "user", "content": SHORT}], choose_budget(replace(assistant.defaults, temperature=temperature), **asked)
        )
        reply.wait()
        return describe_reply(reply, calibration).split("\n")[1:]

    line = "a budget of {} is far below what this model states (120 and more): its answers may break there"
    for budget in (20, 59):
        assert warnings_of(budget=budget) == warnings_of(budget=budget, temperature=0.0) == [line.format(budget)]
    assert warnings_of(budget=60) == []
    assistant.defaults = replace(assistant.defaults, max_tokens=8)  # all is answer, in a budget that no user gave
    assert warnings_of() == []


def test_two_turns_a_comparison_and_the_many_lines_of_a_question(started, tiny) -> None:
    import sbtiny
    from sbtiny.config import Settings

    assistant = sbtiny.load(str(started), settings=Settings(four_bit=False, serve=ServeSettings(temperature=0.0)))
    out = io.StringIO()
    lines = iter(['"""Max has 3 apples.', 'a) sells 1"""', "How many apples?", "/compare", "/think hide", "/exit", "never read"])
    chat = Chat(assistant.defaults)
    Terminal(assistant, chat, Console(file=out, width=80), lambda prompt: next(lines)).run()
    assert next(lines) == "never read"
    assert (chat.turns[0]["content"], chat.pending) == ("Max has 3 apples.\na) sells 1", "How many apples?")
    assert len(chat.answers) == 3  # the comparison asked the last question again
    assert "the base model, without one:" in out.getvalue()
    assert re.search(r"\d+ tokens in place of \d+", out.getvalue())
    assert chat.show_thoughts is False


def run_chat(assistant: Assistant, chat: Chat, *lines: str) -> str:
    """What the terminal shows of a chat of these lines."""
    out, left = io.StringIO(), iter([*lines, "/exit"])
    Terminal(assistant, chat, Console(file=out, width=80), lambda prompt: next(left)).run()
    return out.getvalue()


@pytest.mark.parametrize("budget", ["12", "90%"])
def test_the_base_model_is_compared_without_the_users_budget(started, budget: str) -> None:
    """It has neither a ceiling by it nor a promise."""
    import sbtiny
    from sbtiny.config import Settings

    assistant = sbtiny.load(str(started), settings=Settings(four_bit=False, serve=ServeSettings(temperature=0.0)))
    about = {"model_fingerprint": "x", "format": "solution", "task": "arithmetic", "split": "val", "date": "today"}
    assistant.calibration = calibrate([CalibrationAnswer(10, n) for n in range(6, 16)] * 20, **about, temperature=0.0, top_p=0.95)
    chat = Chat(assistant.defaults)
    with assistant.base_model():
        free = assistant.ask(SHORT)
    shown = run_chat(assistant, chat, f'"""{SHORT}"""', f"/budget {budget}", "/compare")
    assert re.search(rf"\d+ tokens in place of {free.tokens}", shown)


def test_what_cannot_be_asked_again_leaves_the_turns(tiny) -> None:
    assistant = Assistant(build_policy(*tiny, slots=2, states_budget=False), ServeSettings(temperature=0.0, context=512))
    chat = Chat(assistant.defaults)
    shown = run_chat(assistant, chat, f'"""{SHORT}"""', "/compare", "/budget 90%", "/regen")
    assert "there is no base model to compare with" in shown
    assert "no promise without a calibration" in shown
    assert len(chat.answers) == 1
    assert chat.turns[0] == {"role": "user", "content": SHORT}
    assert len(chat.turns) == 2


def test_a_history_that_cannot_be_written_is_said_and_the_chat_goes_on(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    make_reader(tmp_path / "file" / "history")
    assert "no history is kept" in capsys.readouterr().err
