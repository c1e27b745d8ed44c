"""A server under a drill: its processes, its files, and a watch over its health. Knows no drill."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from benchmarks.drills.clients import new_http
from losa_server.bench.running_server import RunningServer

MODEL = str(Path(__file__).parents[1] / "tiny_model" / "checkpoint")
SHARED_MEMORY = Path("/dev/shm")
PROMPT = "The secret code of the red fox is 1234. The secret code of the old clock is 9182. " * 6


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until a condition held, `seconds` and more if it did not."""
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        time.sleep(0.005)
    return time.monotonic() - began if condition() else seconds + 1.0


class DrillServer:
    """`losa serve` with a temporary directory of its own, in which it leaves nothing or is found out."""

    def __init__(self, model: str, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="drill-")
        self._shared_before = self._shared()
        environ = {**os.environ, "TMPDIR": self._folder.name}
        self.server = RunningServer(model, ("--max-total-tokens", "32768", *options), environ=environ)
        self.url, self.http = self.server.url, new_http()

    def __enter__(self) -> Self:
        self.server.__enter__()
        self.process = psutil.Process(self.server.process.pid)
        return self

    def __exit__(self, *about: type[BaseException] | BaseException | TracebackType | None) -> None:
        tree = self.tree()
        self.server.__exit__(*about)
        for process in tree:
            if process.is_running():
                process.kill()
        self._folder.cleanup()

    def tree(self) -> list[psutil.Process]:
        """The processes below the HTTP process."""
        try:
            return self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def engines(self) -> list[psutil.Process]:
        """Engine processes; one, unless it is being replaced."""
        found = []
        for process in self.tree():
            try:
                if any("engine_process" in word for word in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ask(self, tokens: int = 32) -> tuple[int, list[int]]:
        """Status and greedy output of a short call."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        reply = self.http.post(f"{self.url}/generate", json={"text": PROMPT, "sampling_params": params})
        return reply.status_code, reply.json().get("output_ids", [])

    def healthy(self) -> bool:
        """Whether /health says 200."""
        try:
            return self.http.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def state(self) -> dict[str, Any]:
        """The engine's counters."""
        return dict(self.server.get("/server_info")["internal_states"][0])

    def left_over(self) -> list[str]:
        """Files in its directory and in shared memory that were not there before."""
        return [str(path) for path in Path(self._folder.name).rglob("*")] + sorted(self._shared() - self._shared_before)

    def _shared(self) -> set[str]:
        return {str(path) for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


class HealthWatch:
    """Asks /health all the time. changes: (time.monotonic(), status), status 0 for no answer."""

    def __init__(self, url: str) -> None:
        self._url, self.changes = url, list[tuple[float, int]]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def first(self, status: int, since: float, seconds: float) -> float:
        """Seconds from `since` to the first such answer, `seconds` and more if there was none."""
        while time.monotonic() - since < seconds:
            found = [at - since for at, what in list(self.changes) if what == status and at > since]
            if found:
                return found[0]
            time.sleep(0.01)
        return seconds + 1.0

    def _run(self) -> None:
        with new_http() as http:
            while not self._stop.is_set():
                try:
                    status = http.get(f"{self._url}/health").status_code
                except httpx.TransportError:
                    status = 0
                if not self.changes or self.changes[-1][1] != status:
                    self.changes.append((time.monotonic(), status))
                self._stop.wait(0.01)
