"""The outermost middleware: gives each exchange its name and turns what nobody expected into our error object.

Plain ASGI, as all middleware here: the framework's base class for it hides disconnects from the handlers.
"""

from __future__ import annotations

import logging
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from losa_server.errors import RequestFailed
from losa_server.http.replies import error_reply
from losa_server.visit import Visit

log = logging.getLogger("losa.server")

REQUEST_ID = "x-request-id"
# What may stand in a log line and a header as it is; another id is replaced by one of ours.
_GOOD_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)


class Exchange:
    """Puts a Visit into the scope's state, as `visit`, and its id into the answer's headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        visit = Visit(id=given) if _GOOD_ID.fullmatch(given) else Visit()
        scope.setdefault("state", {})["visit"] = visit
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID] = visit.id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:
            return  # it left while it was still sending
        except Exception as error:
            # The traceback goes to the log only: it may name files and hold values of other requests.
            log.exception("%s %s failed (request %s)", scope["method"], scope["path"], visit.id)
            if started:
                raise
            failure = RequestFailed(500, f"internal error ({type(error).__name__})")
            await error_reply(failure)(scope, receive, named)
