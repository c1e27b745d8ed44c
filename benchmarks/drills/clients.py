"""Many clients at once, each in a thread of its own, and what became of them. Knows HTTP, not what is drilled."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

PATIENCE_S = 120.0  # a client that waits longer counts as forgotten


def new_http() -> httpx.Client:
    """Connections for many threads. One for all calls of a drill: to make it takes longer than to be refused."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(PATIENCE_S, pool=None)
    return httpx.Client(verify=False, trust_env=False, limits=limits, timeout=timeout)


class Ending(NamedTuple):
    """What a client got: status 0 if its connection broke, text whatever was read; at: time.monotonic() of its end."""

    status: int
    text: str
    started: float
    at: float

    @property
    def errors(self) -> int:
        """How often it was told of an error."""
        return self.text.count('{"error"')

    @property
    def failed(self) -> bool:
        """Whether it was told of an error, by its status or in its stream, or its connection broke."""
        return self.status != 200 or self.errors > 0

    @property
    def proper(self) -> bool:
        """Whether it was told exactly once how its call ended: by an answer, an error object, or a stream's end."""
        return self.status != 0 and self.errors == int(self.failed) and ("data:" not in self.text or self._whole_stream)

    @property
    def _whole_stream(self) -> bool:
        return self.text.endswith("data: [DONE]\n\n") and self.text.count("data: [DONE]") == 1


class Clients:
    """`count` calls of /generate, every second one streaming.

    body: fields of the call beside `stream`. started: return when the streaming ones have had their first event.
    """

    def __init__(self, url: str, count: int, body: Mapping[str, Any], started: bool = True) -> None:
        self.url, self.endings = url, list[Ending]()
        self._http = new_http()
        self._body, self._first = dict(body), threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, args=(i % 2 == 0,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in range((count + 1) // 2 if started else 0):
            assert self._first.acquire(timeout=PATIENCE_S), self.endings

    @property
    def waiting(self) -> int:
        """Clients that have no ending yet."""
        return len(self._threads) - len(self.endings)

    def join(self, seconds: float) -> list[Ending]:
        """The endings by then; whoever is missing among them still waits."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.endings

    def _run(self, stream: bool) -> None:
        text, status, started = "", 0, time.monotonic()
        body = {**self._body, "stream": stream}
        try:
            with self._http.stream("POST", f"{self.url}/generate", json=body) as reply:
                status = reply.status_code
                for piece in reply.iter_text():
                    if not text and stream:
                        self._first.release()
                    text += piece
        except httpx.TransportError as error:
            status, text = 0, f"{text} {error!r}"
        self.endings.append(Ending(status, text, started, time.monotonic()))
