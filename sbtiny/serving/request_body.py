"""A request's bytes to JSON that is safe to read: not deep, without what is no JSON. Pure."""

import json
from typing import Any

from sbtiny.serving.request_error import RequestError

MOST_DEPTH = 32


def parse_body(data: bytes) -> dict[str, Any]:
    """Parse the body of a request. Raises RequestError for what is not a JSON object, or too deep."""
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
        check_depth(body)
    except RecursionError as error:
        raise RequestError(f"the body is nested more than {MOST_DEPTH} deep", code="too_deep") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {str(error)[:100]}", code="not_json") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="not_an_object")
    return body


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_depth(body: Any) -> None:
    """Raise RequestError for deep nesting, and for text that is not Unicode (half a surrogate pair)."""
    level, depth = [body], 0
    while level:
        if depth > MOST_DEPTH:
            raise RequestError(f"the body is nested more than {MOST_DEPTH} deep", code="too_deep")
        for item in level:
            for text in (item,) if isinstance(item, str) else item if isinstance(item, dict) else ():
                if not is_unicode(text):
                    raise RequestError("the body holds half a surrogate pair, which is no character", code="not_unicode")
        level = [inner for item in level for inner in children(item)]
        depth += 1


def children(item: Any) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
