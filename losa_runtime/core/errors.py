"""Errors are answers: each names what was wrong, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError


class LosaError(Exception):
    """Base of everything this runtime raises on purpose."""


class ConfigError(LosaError):
    """A server or model configuration that cannot be honoured. Raised at start, before any work."""


class CheckpointError(LosaError):
    """A checkpoint folder that cannot be loaded: a missing, unexpected or misshapen tensor, an unknown family."""


class QueueFull(LosaError):
    """The waiting queue is at its limit; the request was not accepted and may be sent again later."""


class EngineBroken(LosaError):
    """The engine cannot go on: start another. suspects: ids of the requests that it was working on when that showed."""

    def __init__(self, message: str, suspects: Collection[str] = ()) -> None:
        self.suspects = frozenset(suspects)
        super().__init__(message)


class InvalidRequest(LosaError):
    """A request that cannot be honoured.

    field: dotted name of the offending field, e.g. `sampling_params.temperature`.
    found: the offending value (shortened for the message).
    allowed: what would have been accepted, in words.
    """

    def __init__(self, field: str, found: object, allowed: str) -> None:
        self.field, self.found, self.allowed = field, found, allowed
        super().__init__(f"{field}: found {_short(found)}, allowed: {allowed}")


def invalid_request(where: str, error: ValidationError) -> InvalidRequest:
    """Turn the first finding of a pydantic ValidationError into an InvalidRequest whose field starts with `where`."""
    first: Any = error.errors(include_url=False)[0]
    loc: Sequence[object] = first["loc"]
    field = ".".join([where, *(str(part) for part in loc if part != "[key]")])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return cause
    message = "a known key" if first["type"] == "extra_forbidden" else str(first["msg"])
    return InvalidRequest(field, first.get("input"), message)


def _short(value: object, limit: int = 120) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python is willing to print
        text = "a huge number"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
