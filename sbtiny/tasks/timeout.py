"""A time limit on checking one answer with a user's code."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
TIMEOUT_S = 5.0  # for one answer
REPEAT_S = 0.1  # seconds until the next alarm, for code that caught the first


class VerifierTimeout(BaseException):
    """The check took too long. Not an Exception: code that retries on every Exception would never stop."""


def with_timeout(check: Callable[..., T], *arguments: object) -> T:
    """Call `check`; VerifierTimeout is raised inside it after TIMEOUT_S.

    Needs the main thread and a system with alarms; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return check(*arguments)
    is_checking = True

    def stop(_: int, __: FrameType | None) -> None:
        if is_checking:
            raise VerifierTimeout(f"took longer than {TIMEOUT_S:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S, REPEAT_S)
        return check(*arguments)
    finally:
        is_checking = False  # first, as the next alarm may come at once
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
