"""Many clients at once, each in a thread of its own, and what became of them."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import httpx


class Ending(NamedTuple):
    """What a client got: status 0 if its connection broke. at: time.monotonic() of its end."""

    status: int
    text: str
    at: float

    @property
    def failed(self) -> bool:
        """Whether it was told of an error, by its status or in its stream."""
        return self.status >= 500 or '{"error"' in self.text


class Clients:
    """`count` calls of /generate, every second one streaming; made when these have had their first event.

    text: of the prompt. tokens: wanted. For the echo engine "SLOW fox" takes 50 ms per four tokens and client.
    """

    def __init__(self, url: str, count: int, text: str = "SLOW fox", tokens: int = 4000, started: bool = True) -> None:
        self.url, self.endings = url, list[Ending]()
        self._body = {"text": text, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
        self._started = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, args=(i % 2 == 0,)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in range((count + 1) // 2 if started else 0):
            assert self._started.acquire(timeout=30), self.endings

    def join(self, seconds: float) -> list[Ending]:
        """All endings. Fails if a client still waits then."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert len(self.endings) == len(self._threads), f"{len(self._threads) - len(self.endings)} clients wait"
        return self.endings

    def _run(self, stream: bool) -> None:
        text, status = "", 0
        try:
            body = {**self._body, "stream": stream}
            with httpx.stream("POST", f"{self.url}/generate", json=body, timeout=60) as reply:
                status = reply.status_code
                for piece in reply.iter_text():
                    if not text and stream:
                        self._started.release()
                    text += piece
        except httpx.TransportError as error:
            status, text = 0, f"{text} {error!r}"
        self.endings.append(Ending(status, text, time.monotonic()))
