"""The outermost middleware: names each exchange, tells of its end, and answers what nobody expected.

Plain ASGI, as all middleware here: the framework's base class for it hides disconnects from the handlers. What is
told are counts and times, never what a client wrote.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from losa_server.errors import RequestFailed
from losa_server.http.replies import error_reply
from losa_server.tracing import read_traceparent
from losa_server.visit import Visit

log = logging.getLogger("losa.server")
request_log = logging.getLogger("losa.request")

REQUEST_ID = "x-request-id"
# What may stand in a log line and a header as it is; another id is replaced by one of ours.
_GOOD_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)
CLIENT_CLOSED_REQUEST = 499
# What machines ask every few seconds is told at debug level only.
ROUTINE = frozenset({"/health", "/ready", "/ping", "/metrics"})

Told = Callable[[Visit, str, str, int], None]  # (visit, method, path, status code)


class Exchange:
    """Puts a Visit into the scope's state, as `visit`, and its id into the answer's headers.

    on_end: called after each exchange. Its status code is 499 if the client left before there was one.
    """

    def __init__(self, app: ASGIApp, on_end: tuple[Told, ...] = ()) -> None:
        self._app, self._on_end = app, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _visit(Headers(scope=scope))
        scope.setdefault("state", {})["visit"] = visit
        status_code = CLIENT_CLOSED_REQUEST
        started = False

        async def named(message: Message) -> None:
            nonlocal status_code, started
            if message["type"] == "http.response.start":
                status_code, started = message["status"], True
                MutableHeaders(scope=message)[REQUEST_ID] = visit.id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:
            pass  # it left while it was still sending
        except Exception as error:
            # The traceback goes to the log only: it may name files and hold values of other requests.
            log.exception("%s %s failed", scope["method"], _shown(scope["path"]), extra={"fields": _names(visit)})
            if started:
                raise
            failure = RequestFailed(500, f"internal error ({type(error).__name__})")
            await error_reply(failure)(scope, receive, named)
        finally:
            for told in self._on_end:
                told(visit, scope["method"], _shown(scope["path"]), status_code)


def log_exchange(visit: Visit, method: str, path: str, status_code: int) -> None:
    """One line about an exchange that has ended."""
    tally, seconds = visit.tally, time.monotonic() - visit.started
    fields = _names(visit)
    if tally.requests:
        fields |= {
            "requests": tally.requests,
            "prompt_tokens": tally.prompt_tokens,
            "cached_tokens": tally.cached_tokens,
            "completion_tokens": tally.completion_tokens,
            "denoise_steps": tally.denoise_steps,
            "ended": "+".join(sorted(tally.ended)),
        }
    if tally.first_s is not None:
        fields["first_s"] = round(tally.first_s, 4)
    level = logging.DEBUG if path in ROUTINE and status_code < 400 else logging.INFO
    fields |= {"status": status_code, "seconds": round(seconds, 4)}
    request_log.log(level, "%s %s", method, path, extra={"fields": fields})


def _visit(headers: Headers) -> Visit:
    given, trace = headers.get(REQUEST_ID, ""), read_traceparent(headers.get("traceparent"))
    return Visit(id=given, trace=trace) if _GOOD_ID.fullmatch(given) else Visit(trace=trace)


def _names(visit: Visit) -> dict[str, Any]:
    names: dict[str, Any] = {"request_id": visit.id}
    if visit.trace is not None:
        names["trace_id"] = visit.trace.trace_id
    if visit.caller.name:
        names["caller"] = visit.caller.name
    return names


def _shown(path: str) -> str:
    """A path as it may stand in a log: a client can write anything into it."""
    plain = path if path.isascii() and path.isprintable() else ascii(path)
    return plain if len(plain) <= 200 else plain[:199] + "…"
