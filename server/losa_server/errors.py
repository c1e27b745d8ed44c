"""Errors of the server side, each with the HTTP status that answers it. Knows nothing of HTTP beyond that number."""

from __future__ import annotations

from losa_runtime.core.errors import InvalidRequest, LosaError, QueueFull


class RequestFailed(LosaError):
    """A request that ended without a result. status_code: HTTP. field: what was wrong in the body, if anything was."""

    def __init__(self, status_code: int, message: str, field: str | None = None) -> None:
        self.status_code, self.message, self.field = status_code, message, field
        super().__init__(message)


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
