"""What a server refuses, in OpenAI's shape."""

from typing import Any

from sbtiny.errors import InputError

CLIENT_GONE = 499  # a status that nobody reads: the client has closed the connection


class RequestError(InputError):
    """A request that is refused. `param` names the field, `code` the reason for programs, `status` is HTTP's, `retry` in seconds."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400, retry: int = 1) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.retry = param, code, status, retry


def error_body(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object that OpenAI's clients read."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
