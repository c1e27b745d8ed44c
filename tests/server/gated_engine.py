"""An engine whose steps a test lets happen one by one, and can look into while it waits."""

from __future__ import annotations

import threading
from typing import Any

from losa_runtime.core.request import RequestOutput


class GatedEngine:
    """The face of `engine`; each step that would do something waits for `allow`. open_gate: no step waits any more."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.steps = 0
        self._permits = threading.Semaphore(0)
        self._open = False

    def allow(self, steps: int) -> None:
        """Let so many steps happen."""
        for _ in range(steps):
            self._permits.release()

    def open_gate(self) -> None:
        """Let all steps happen from now on."""
        self._open = True
        self._permits.release()

    def step(self) -> list[RequestOutput]:
        if not self._open:
            self._permits.acquire()
        outputs: list[RequestOutput] = self.engine.step()
        self.steps += 1
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
