import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks import latex
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import auto, math


def ask(answer: str) -> Question:
    return Question("q1", "How many?", answer)


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("\\boxed{1+x}", "x+1", True),
        ("\\boxed{\\frac{\\sqrt{3}}{3}}", "\\frac{1}{\\sqrt 3}", True),
        ("\\boxed{(x-2)(x+2)}", "x^2-4", True),
        ("\\boxed{-2, 1}", "1,-2", True),
        ("\\boxed{\\left(3,\\ \\frac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("So the answer is \\( (a + 5)(b + 2) \\).", "(a+5)(b+2)", True),
        ("\\boxed{0.75}", "\\frac{3}{4}", True),
        ("\\boxed{x+2}", "x+1", False),
        ("\\boxed{(3, 4)}", "(4, 3)", False),
        ("\\boxed{[3, 4]}", "(3, 4)", False),
        ("\\boxed{\\text{west}}", "\\text{east}", False),
        ("\\boxed{__import__('os').system('true')}", "x+1", False),
        ("no idea", "x+1", False),
        ("\\boxed{" + "x+" * 2000 + "1}", "x+1", False),
    ],
)
def test_math(response: str, answer: str, verdict: bool) -> None:
    assert math(response, ask(answer)) is verdict


@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", "(10^8)!", "\\sum_{k=1}^{10^9} k^{k}", "10^{10^{10}} + x"])
def test_math_survives_hostile_answers(hostile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert math("\\boxed{1+x}", ask("x+1"))  # the process is up
    monkeypatch.setattr(latex, "MATH_SECONDS", 0.5)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert not math(f"\\boxed{{{hostile}}}", ask("x+1"))
    assert time.monotonic() - begin < 5
    assert "counted as wrong" in caplog.text
    monkeypatch.undo()
    assert math("\\boxed{1+x}", ask("x+1"))


def test_math_works_in_many_threads() -> None:
    verdicts: dict[int, bool] = {}

    def check(number: int) -> None:
        verdicts[number] = math(f"\\boxed{{{number}+x}}", ask(f"x+{number // 2 * 2}"))

    threads = [threading.Thread(target=check, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert verdicts == {number: number % 2 == 0 for number in range(8)}


def test_the_comparing_process_ends_with_its_parent() -> None:
    code = """
import os
from sbtiny.tasks.latex import math_process
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import math
assert math("\\\\boxed{1+x}", Question("q", "?", "x+1"))
print(math_process(os.getpid()).process.pid)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(told.stdout)
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)
    assert told.stderr == ""


def test_a_failing_comparison_is_told_and_is_not_the_end_of_the_process() -> None:
    code = "import sbtiny.tasks.latex as a; a.compare_pair = lambda one, other: one == other or 1 / 0; a.run_math_worker()"
    lines = '["1", "2"]\n["1", "1"]\n'
    told = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=True)
    assert told.stdout == "failed: ZeroDivisionError: division by zero\ntrue\n"


def test_what_went_wrong_in_a_comparison_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(latex.MathProcess, "start", lambda self: None)
    monkeypatch.setattr(latex.MathProcess, "ask", lambda self, process, line, seconds: "failed: TypeError: no")
    assert latex.MathProcess().same("question q1", "x", "y") is False
    assert "question q1: comparing failed: TypeError: no: counted as wrong" in caplog.text


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # nobody may be there to collect a dead orphan
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_math_without_its_package_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=re.escape("pip install 'sbtiny[tasks]'")):
        auto("\\boxed{x}", ask("x"))
    assert auto("\\boxed{5}", ask("5"))
