"""What stdout and stderr can take: every character on one that is not UTF-8, and a quiet end where nobody reads on."""

import codecs
import os
import select
import sys
from pathlib import Path
from typing import Any

# Plain signs for those that we, and rich's bars, print.
PLAIN = dict.fromkeys("–—−━╸╺", "-") | {"±": "+-", "×": "x", "·": ".", "…": ".", "▏": "|", "↵": "/", "\ufffd": "?"}


def write_plainly(error: UnicodeError) -> tuple[str, int]:
    """A handler for `codecs`: what the stream cannot encode as a plain sign, or else as its code, such as \\xe9."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs), error.end


def accept_all() -> None:
    """Let stdout and stderr take any text, in whatever they are encoded (a log's ASCII, a path that is no UTF-8)."""
    codecs.register_error("sbtiny", write_plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams, and none at all, take what comes
            stream.reconfigure(errors="sbtiny")


def is_unicode(stream: Any) -> bool:
    return "utf" in (getattr(stream, "encoding", None) or "utf").lower()


def unread() -> list[int]:
    """Which of stdout and stderr are pipes that nobody reads any more; rich has then put the null device in the place of stdout."""
    found = []
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None or not hasattr(select, "poll"):
            continue
        poll, number = select.poll(), stream.fileno()
        poll.register(number, select.POLLOUT)
        null = os.path.samestat(os.fstat(number), Path(os.devnull).stat())
        if null or any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            found.append(number)
    return found


def flush() -> bool:
    """Write out what is left; False where nobody reads it, and then nothing complains of that at the end."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        for number in unread():
            os.dup2(null, number)
        return False
    return True
