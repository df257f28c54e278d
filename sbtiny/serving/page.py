"""The page at `/`: one file without outside resources, and the policy that lets only its own script and style run."""

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("sbtiny.serving").joinpath("page.html").read_text(encoding="utf-8")


def hash_inline(page: str, tag: str) -> str:
    """The source expression of the one element of a tag, as browsers hash it."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {hash_inline(PAGE, 'style')}",
        f"script-src {hash_inline(PAGE, 'script')}",
        "img-src data:",  # the empty icon: without one, browsers ask for /favicon.ico
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
