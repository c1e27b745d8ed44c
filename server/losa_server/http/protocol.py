"""How bytes on a connection become requests: uvicorn's h11 protocol with our limits of time and size, and our errors.

What is decided here cannot be decided later: a head that never ends, bytes that are no HTTP, a client that does not
read its answer. Everything else is middleware.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import Any

import h11
import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from losa_server.errors import RequestFailed
from losa_server.http.replies import error_body
from losa_server.settings import ServerSettings

BACKLOG = 2048
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class Protocol(H11Protocol):
    """head_s: seconds that the head of a request may take. stall_s: seconds that a client may leave an answer unread;
    its connection is then cut, and its requests end as if it had left."""

    def __init__(self, *args: Any, head_s: float, stall_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_s, self._stall_s = head_s, stall_s
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection owes us a head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """More bytes: of a head, or of what follows it."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_head()
        elif self._head is None and not self.transport.is_closing():
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection, and of what we waited for."""
        self._cancel_head()
        self._cancel_stall()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next head is awaited by uvicorn's keep-alive timer until its first byte comes."""
        self._cancel_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._cancel_stall()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles the error of h11, which knows whether the head was merely too large."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(RequestFailed(431, "the head of the request is too large"))
        else:
            self._refuse(RequestFailed(400, "this is not HTTP/1.1 as it should be"))

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self._head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        if not self.conn.trailing_data[0]:
            self.transport.close()  # it has not begun to ask for anything, so it gets no answer
        else:
            self._refuse(RequestFailed(408, f"the head of a request did not arrive within {self._head_s:g} s"))

    def _refuse(self, error: RequestFailed) -> None:
        """Answer without an application, if an answer can still be sent, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = orjson.dumps(error_body(error))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head = h11.Response(status_code=error.status_code, headers=headers, reason=_REASONS[error.status_code])
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _cancel_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _cancel_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def http_config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn is to serve the application."""
    protocol: Any = partial(Protocol, head_s=settings.head_timeout, stall_s=settings.stall_timeout)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_s)),
    )
