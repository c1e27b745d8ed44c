"""The door: who may come in, and as what. Every path needs a key, but for those that are named here.

Plain ASGI. Where there are no keys, anybody who can reach the port may come in, so browsers are kept from lending
their reach to pages of other sites (the Origin, Sec-Fetch-Site and Host headers, which a page cannot choose).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from losa_server.errors import RequestFailed
from losa_server.http.replies import error_reply
from losa_server.keys import Keyring
from losa_server.visit import Visit

# Probes: they tell whether there is a live engine, nothing else.
OPEN = frozenset({"/health", "/ready", "/ping"})
# What changes the server for everybody, or tells how it was started.
ADMIN = frozenset(
    {"/flush_cache", "/start_profile", "/stop_profile", "/get_server_info", "/server_info", "/get_server_args"}
)
NEEDS_KEY = RequestFailed(401, "a key of this server is needed: send the header `Authorization: Bearer KEY`")


class Guard:
    """Answers 401 and 403 to those who may not come in; puts the caller of the others into the visit.

    local: the port is reachable from this machine only. host: what it listens on. origins: of pages of other sites
    that browsers may lend their reach to.
    """

    def __init__(self, app: ASGIApp, keys: Keyring, local: bool, host: str, origins: Collection[str] = ()) -> None:
        self._app, self._keys, self._local = app, keys, local
        self._hosts, self._origins = frozenset({"localhost", host}), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there is nothing here for them
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            await error_reply(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestFailed | None:
        headers, path = Headers(scope=scope), scope["path"]
        if not self._keys and (reason := self._foreign(headers)) is not None:
            return RequestFailed(403, reason)
        if path in OPEN:
            return None
        caller = self._keys.caller(_bearer(headers))
        if caller is None:
            return NEEDS_KEY
        visit: Visit = scope["state"]["visit"]
        visit.caller = caller
        if path in ADMIN and not caller.admin:
            return not_admin(visit)
        return None

    def _foreign(self, headers: Headers) -> str | None:
        """Why a browser's request is not one of this server's own pages; None if it is, or if it is no browser's."""
        origin, site, host = headers.get("origin"), headers.get("sec-fetch-site"), headers.get("host", "")
        if (origin is None and site is None) or origin in self._origins:
            return None
        if site in ("cross-site", "same-site") or (origin is not None and urlsplit(origin).netloc != host):
            return f"a page of another site may not use this server (origin {origin!r}; see --allowed-origins)"
        # A page may come from a name that was made to point at this machine.
        if self._local and not self._is_ours(host):
            return f"the host {host!r} is not this server's"
        return None

    def _is_ours(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname or ""
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def not_admin(visit: Visit) -> RequestFailed:
    """The answer to somebody who may use the server but not manage it."""
    if visit.caller.name:
        return RequestFailed(403, "this call needs the server's admin key")
    return RequestFailed(403, "managing needs a key, as this server listens beyond its machine: see --admin-api-key")


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
