"""A disk that takes no more: full, over a quota or a file size limit, or read-only."""

import errno
import os
import re

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Libraries raise errors of their own. safetensors quotes the system, numpy counts, C++ names its stream, torch.save its source file.
MESSAGE = re.compile(
    "No space left on device|Disk quota exceeded|File too large|Read-only file system"
    r"|\d+ requested and \d+ written|iostream error|inline_container"
)


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because the disk takes no more."""
    return bool(disk_full_reason(error))


def disk_full_reason(error: Exception) -> str:
    """Why the disk takes no more, in the system's words where it gave them; empty for any other error."""
    found = MESSAGE.search(str(error))
    if found:
        return "torch could not write all of a file" if found[0] == "inline_container" else found[0]
    code = getattr(error, "errno", None)
    return os.strerror(code) if code in CODES else ""


def disk_full_error() -> OSError:
    """The system's own error, for a write that failed without one."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
