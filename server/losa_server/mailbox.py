"""Where the news of one request waits for the coroutine that wants it. Knows no sockets and no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque

from losa_runtime.core.request import RequestOutput
from losa_server.errors import RequestFailed


class Mailbox:
    """News of one request, in order. Bounded by the request's own length: one output per finished block, or per
    denoising step for a request that is traced."""

    def __init__(self) -> None:
        self._news: deque[RequestOutput] = deque()
        self._failure: RequestFailed | None = None
        self._arrived = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Add news."""
        self._news.append(output)
        self._arrived.set()

    def fail(self, failure: RequestFailed) -> None:
        """End the request; whoever takes next gets this error, after the news that came before it."""
        self._failure = self._failure or failure
        self._arrived.set()

    async def take(self) -> list[RequestOutput]:
        """All news since the last call, at least one. Raises RequestFailed when the request ended without a result."""
        while not self._news:
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()
        news = list(self._news)
        self._news.clear()
        return news
