"""A limit on how long checking one answer may take, for code that may be anyone's."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
SECONDS = 5.0  # for one answer
AGAIN = 0.1  # seconds after which code that caught the alarm meets it again


class TooLong(BaseException):
    """No Exception: code that tries something until it works would catch it, and go on for ever."""


def limited(check: Callable[..., T], *arguments: object) -> T:
    """What `check` returns; TooLong is raised inside it after SECONDS.

    Needs the main thread of a system with alarms; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return check(*arguments)
    inside = True

    def stop(_: int, __: FrameType | None) -> None:
        if inside:
            raise TooLong(f"took longer than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS, AGAIN)
        return check(*arguments)
    finally:
        inside = False  # first of all: the next alarm may be on its way
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
