"""Answers as bytes: JSON responses, the one error object of all routes, and server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from losa_server.errors import RequestFailed, for_strangers

DONE = b"data: [DONE]\n\n"


def json_reply(value: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(orjson.dumps(value), status_code, headers, media_type="application/json")


def error_body(error: RequestFailed) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients and SGLang's read it.

    param: dotted name of the field that was wrong, or null. code: a word if there is one, else the HTTP status.
    """
    message = for_strangers(error.message, ours=error.status_code >= 500)
    code = error.code or error.status_code
    return {"error": {"message": message, "type": error.kind, "param": error.field, "code": code}}


def error_reply(error: RequestFailed, headers: Mapping[str, str] | None = None) -> Response:
    """An error as a response; 503 says when to come back, 401 what is missing."""
    more = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status_code, {})
    return json_reply(error_body(error), error.status_code, {**more, **(headers or {})})


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class EventStream(Response):
    """A stream of events. close: called once, whatever happens, also if the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self._inner = StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.background = None
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._inner(scope, receive, send)
        finally:
            self._close()
