"""Keeps an engine there: starts one, and another when it is lost, but not for ever. Knows no requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from losa_server.engine_client import EngineClient
from losa_server.engine_life import EngineLife

log = logging.getLogger("losa.server")

WINDOW_S = 60.0
# Before the second restart within the window, twice as long before the third, …: a device takes a while to give its
# memory back, and a fault that is still there needs no haste.
PAUSE_S = 1.0


class RestartBudget:
    """At most `limit` restarts within the last WINDOW_S seconds."""

    def __init__(self, limit: int, now: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._now = limit, now
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """One more restart? True if it may be, and it is then counted."""
        now = self._now()
        while self._times and now - self._times[0] >= WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return False
        self._times.append(now)
        return True

    @property
    def pause_s(self) -> float:
        """How long to wait with the restart that was just taken: not at all with the first one."""
        return PAUSE_S * (len(self._times) - 1)


class Supervisor:
    """Gives `client` its engines.

    start: starts the process of a life. on_give_up: called once, with the reason, when engines are lost too often. The
    first engine is the caller's care until it is ready: if it cannot load, no other would.
    """

    def __init__(
        self,
        client: EngineClient,
        start: Callable[[EngineLife], None],
        max_restarts: int,
        on_give_up: Callable[[str], None],
    ) -> None:
        self._client, self._start, self._on_give_up = client, start, on_give_up
        self._budget = RestartBudget(max_restarts)
        self._life: EngineLife | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._retired = True

    def begin(self) -> EngineLife:
        """Start an engine; its `ready` says when, or why not."""
        life = self._life = EngineLife(self._client.take, self._lost)
        self._client.attach(life)
        self._start(life)
        return life

    def keep(self) -> None:
        """From now on, replace engines that are lost."""
        self._retired = False

    def retire(self) -> None:
        """Replace none any more."""
        self._retired = True

    async def close(self) -> None:
        """End the engine, whatever its state."""
        self.retire()
        if self._replacing is not None:
            await asyncio.gather(self._replacing, return_exceptions=True)
        if self._life is not None:
            await self._life.close()

    def _lost(self, reason: str) -> None:
        self._client.lost(reason)
        log.error("the engine is gone: %s", reason)
        if not self._retired:
            self._replacing = asyncio.create_task(self._replace(reason))

    async def _replace(self, reason: str) -> None:
        lost, self._life = self._life, None
        assert lost is not None
        await lost.close()
        if self._retired:
            return
        if not self._budget.take():
            log.critical("%d engines lost within %g s: giving up", self._budget.limit + 1, WINDOW_S)
            self._on_give_up(reason)
            return
        deadline = time.monotonic() + self._budget.pause_s
        while not self._retired and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._retired:
            return
        log.warning("starting another engine")
        self._client.restarts += 1
        began = time.monotonic()
        self.begin().ready.add_done_callback(lambda ready: _say_ready(ready, time.monotonic() - began))


def _say_ready(ready: asyncio.Future[dict[str, Any]], seconds: float) -> None:
    if not ready.cancelled() and ready.exception() is None:
        log.warning("another engine is ready after %.1f s", seconds)
