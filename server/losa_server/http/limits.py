"""Middleware that refuses bodies over a limit before they fill the memory. Plain ASGI: others hide disconnects."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from losa_server.errors import RequestFailed
from losa_server.http.replies import error_reply


class _TooLarge(Exception):
    """The body has grown over the limit."""


class BodyLimit:
    """Answers 413 when the declared or the received size of a body exceeds `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        refusal = error_reply(RequestFailed(413, f"the body is larger than {self._max_bytes} bytes", "body"))
        if declared.isdigit() and int(declared) > self._max_bytes:
            await refusal(scope, receive, send)
            return
        size, started = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLarge:
            if started:
                raise
            await refusal(scope, receive, send)
