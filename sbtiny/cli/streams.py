"""stdout and stderr that accept every character in any encoding, and end quietly after a broken pipe."""

import codecs
import os
import select
import sys
from pathlib import Path
from typing import Any

# ASCII for the signs that sbtiny and rich's bars print.
PLAIN = dict.fromkeys("–—−━╸╺", "-") | {"±": "+-", "×": "x", "·": ".", "…": ".", "▏": "|", "↵": "/", "\ufffd": "?"}


def write_plainly(error: UnicodeError) -> tuple[str, int]:
    """Error handler for `codecs`: replace what the stream cannot encode by a plain sign, or by its code, such as \\xe9."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs), error.end


def accept_any_text() -> None:
    """Let stdout and stderr accept any text, whatever their encoding (an ASCII log, a path that is not UTF-8)."""
    codecs.register_error("sbtiny", write_plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams accept all text; there may be no stream
            stream.reconfigure(errors="sbtiny")


def encodes_unicode(stream: Any) -> bool:
    return "utf" in (getattr(stream, "encoding", None) or "utf").lower()


def broken_streams() -> list[int]:
    """File numbers of stdout and stderr that nobody reads any more: broken pipes, or the null device, which rich puts there."""
    numbers = []
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None or not hasattr(select, "poll"):
            continue
        poll, number = select.poll(), stream.fileno()
        poll.register(number, select.POLLOUT)
        null = os.path.samestat(os.fstat(number), Path(os.devnull).stat())
        if null or any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            numbers.append(number)
    return numbers


def try_flush() -> bool:
    """Flush both streams; False if nobody reads them. They then go to the null device, so that Python prints no error at exit."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        for number in broken_streams():
            os.dup2(null, number)
        return False
    return True
