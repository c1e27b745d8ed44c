"""Middleware that refuses heads and bodies over their limits before they fill memory or time. Plain ASGI."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from losa_server.errors import RequestFailed
from losa_server.http.replies import error_reply
from losa_server.settings import ServerSettings

CLOSE = {"Connection": "close"}  # what the client goes on to send is not read


class _Refused(Exception):
    """The body has grown over a limit, in size or time."""

    def __init__(self, error: RequestFailed) -> None:
        self.error = error


class Limits:
    """Answers 431 for too many header lines or bytes, 413 for a body over its size (declared or received), and 408
    for one that does not arrive in time."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._head(scope)
        if refusal is not None:
            await error_reply(refusal, CLOSE)(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, self._bounded(receive), noted)
        except _Refused as error:
            if started:
                raise
            await error_reply(error.error, CLOSE)(scope, receive, send)

    def _head(self, scope: Scope) -> RequestFailed | None:
        headers, limits = scope["headers"], self._settings
        if len(headers) > limits.max_headers:
            allowed = f"at most {limits.max_headers} (--max-headers)"
            return RequestFailed(431, f"headers: found {len(headers)} lines, allowed: {allowed}")
        size = sum(len(name) + len(value) for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size > limits.max_header_bytes:
            allowed = f"at most {limits.max_header_bytes} (--max-header-bytes)"
            return RequestFailed(431, f"headers: found {size} bytes with the path, allowed: {allowed}")
        declared = next((value for name, value in headers if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > limits.max_body_bytes:
            return self._too_large(int(declared[:20]))
        return None

    def _too_large(self, found: int) -> RequestFailed:
        allowed = f"at most {self._settings.max_body_bytes} bytes (--max-body-bytes)"
        return RequestFailed(413, f"body: found {found} bytes or more, allowed: {allowed}", "body")

    def _bounded(self, receive: Receive) -> Receive:
        size, complete = 0, False
        deadline = time.monotonic() + self._settings.body_timeout

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is the news that the client has left, and that may take as long as it likes
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                late = f"body: found {size} bytes after {self._settings.body_timeout:g} s, allowed: all of it by then"
                raise _Refused(RequestFailed(408, late, "body")) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._settings.max_body_bytes:
                raise _Refused(self._too_large(size))
            return message

        return bounded
