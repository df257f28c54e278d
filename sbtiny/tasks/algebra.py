"""Whether two formulas are the same, told by math-verify in a process of its own that is killed when it takes too long."""

import json
import logging
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache

from sbtiny.errors import Failed
from sbtiny.tasks.sources import Question

MATH_SECONDS = 3.0  # for one symbolic comparison; most take hundredths
MATH_BYTES = 2 << 30  # address space of the comparing process


def squeezed(latex: str) -> str:
    """LaTeX without what never changes its meaning: spaces, the size of brackets and fractions, a final full stop."""
    return re.sub(r"\s|\\left\b|\\right\b|\\[!,;: ]|\$|(?<=\\)[dt](?=frac)|\.$", "", latex)


class MathProcess:
    """math-verify in a process of its own, killed when one comparison takes too long.

    math-verify's own limit is an alarm: it works in the main thread alone, and a huge number may fill the memory first.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def same(self, question: Question, answer: str) -> bool:
        with self.lock:
            process = self.process or self.start()
            reply = self.ask(process, json.dumps([question.answer, answer]), MATH_SECONDS)
        if not reply:
            why = f"comparing took over {MATH_SECONDS:.0f} s or too much memory: counted as wrong"
            logging.getLogger(__name__).warning("%s: %s", question.named, why)
        return reply == "true"

    def start(self) -> subprocess.Popen[str]:
        code = "from sbtiny.tasks.algebra import compare_math; compare_math()"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent
        )
        if self.ask(self.process, "[]", seconds=60.0) != "ready":
            raise Failed(f"math-verify does not start: run {sys.executable} -c 'import math_verify' to see why")
        return self.process

    def ask(self, process: subprocess.Popen[str], line: str, seconds: float) -> str:
        """One line of reply, or nothing when the process died or had to be killed."""
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        reply = ""
        try:
            with suppress(BrokenPipeError):
                print(line, file=process.stdin, flush=True)
                reply = process.stdout.readline().strip()
        finally:
            timer.cancel()
            if not reply:  # also after Ctrl-C: a late reply must not answer the next question
                process.kill()
                process.communicate()
                self.process = None
        return reply


@cache
def math_process(pid: int) -> MathProcess:
    """The comparing process of process `pid`: a forked child must not talk through its parent's pipes."""
    return MathProcess()


def compare_math() -> None:
    """The work of that process: pairs of reference and answer on stdin, `true` or `false` on stdout."""
    reply, sys.stdout = sys.stdout, sys.stderr  # libraries print
    logging.disable()
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, MATH_BYTES))
    alarm = getattr(signal, "alarm", lambda seconds: None)  # its default is to end the process: for one left an orphan
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]  # the plain-text extractor hands text to sympy's parse_expr, which evaluates it
    for line in sys.stdin:
        alarm(round(MATH_SECONDS) + 2)
        verdict = "ready"
        if pair := json.loads(line):
            gold, found = (parse(f"${text}$", latex, parsing_timeout=None) for text in pair)
            verdict = json.dumps(verify(gold, found, timeout_seconds=None))
        alarm(0)
        print(verdict, file=reply, flush=True)
