"""Errors of the server side, each with the HTTP status that answers it. Knows nothing of HTTP beyond that number."""

from __future__ import annotations

import re

from losa_runtime.core.errors import InvalidRequest, LosaError, QueueFull

# What a message of a fault on our side must not tell: places in memory and in the file system.
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")
_PATH = re.compile(r"(?<![\w/.:])~?(?:/[\w.+@-]+){2,}/?")
LONGEST_MESSAGE = 2000

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class RequestFailed(LosaError):
    """A request that ended without a result. status_code: HTTP. field: what was wrong in the body, if anything was.
    code: a word for machines, where OpenAI's API has one."""

    def __init__(self, status_code: int, message: str, field: str | None = None, code: str | None = None) -> None:
        self.status_code, self.message, self.field, self.code = status_code, message, field, code
        super().__init__(message)

    @property
    def kind(self) -> str:
        """The sort of error, in the words of OpenAI's API."""
        return _KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")


class EngineUnavailable(RequestFailed):
    """There is no engine to serve the request: not ready yet, or dead."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message)


class ClientGone(LosaError):
    """The client closed its connection before the answer was ready."""


class StartFailed(LosaError):
    """The server could not start; the message is one line for a person."""


def as_failure(error: LosaError) -> RequestFailed:
    """The answer to an error of the runtime: 400 with the field, 503 when full, 500 for the rest."""
    if isinstance(error, RequestFailed):
        return error
    if isinstance(error, InvalidRequest):
        return RequestFailed(400, str(error), error.field)
    if isinstance(error, QueueFull):
        return RequestFailed(503, str(error) or "the waiting queue is full, try again later")
    return RequestFailed(500, str(error))


def for_strangers(message: str, ours: bool) -> str:
    """A message as it may leave the server: short, without memory addresses; without paths if the fault is `ours`.

    A client's own mistake is answered with what it sent, and that may well be a path.
    """
    text = _ADDRESS.sub("0x…", message)
    if ours:
        text = _PATH.sub("<path>", text.partition("Traceback (most recent call last)")[0])
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"
