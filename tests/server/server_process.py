"""`losa serve` as a process of its own, for tests that send signals and look at exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0  # for machines that do much else; nothing here waits so long when all is well
FAKE_ENGINE = (sys.executable, "-m", "tests.server.fake_engine_process")
# Runs the server with another engine process than the real one.
WITH_OTHER_ENGINE = (
    "import sys; from losa_server import launch; from losa_server.cli import main; real = launch.serve_until_stopped;"
    "launch.serve_until_stopped = lambda c, s: real(c, s, {!r}); sys.exit(main(sys.argv[1:]))"
)


def free_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_engine(process: psutil.Process) -> bool:
    """Whether a process is an engine, and not e.g. one that compiles patterns."""
    try:
        return any("engine_process" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def gone(process: psutil.Process, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


class ServerProcess:
    """Started on entry, killed with its engine on exit if it is still there. fake: with the engine process `engine`.
    port: None = a free one."""

    def __init__(
        self,
        *options: str,
        fake: bool = True,
        tmp: Path,
        engine: tuple[str, ...] = FAKE_ENGINE,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        head = ("-c", WITH_OTHER_ENGINE.format(engine)) if fake else ("-m", "losa_server")
        self.command = [sys.executable, *head, "serve", "--port", str(self.port), *options]
        self.tmp = tmp
        self.log = tmp / "server.log"

    def __enter__(self) -> Self:
        environment = {**os.environ, "TMPDIR": str(self.tmp)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for child in self.children():
            child.kill()
        self.process.kill()
        self.process.wait()

    def children(self) -> list[psutil.Process]:
        """The engine process, if there is one."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        (engine,) = [child for child in self.children() if is_engine(child)]
        return engine

    def first_engine(self) -> psutil.Process:
        """The engine, as soon as there is one; it has hardly begun to load."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output()
            engines = [child for child in self.children() if is_engine(child)]
            if engines:
                return engines[0]
            time.sleep(0.002)
        raise AssertionError(f"no engine: {self.output()}")

    def new_engine(self, before: psutil.Process, seconds: float = PATIENCE_S) -> psutil.Process:
        """The engine that has taken the place of another, ready to serve."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            engines = [child for child in self.children() if is_engine(child) and child != before]
            if engines:
                self.wait_ready(deadline - time.monotonic())
                return engines[0]
            time.sleep(0.02)
        raise AssertionError(f"no other engine: {self.output()}")

    def wait_ready(self, seconds: float = PATIENCE_S) -> None:
        """Until /health says 200."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output()
            try:
                if httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.output()}")

    def wait_refusing(self) -> None:
        """Until /health says 503."""
        deadline = time.monotonic() + PATIENCE_S
        while httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code != 503:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def wait_live(self, count: int) -> None:
        """Until so many requests have been accepted and not answered."""
        deadline = time.monotonic() + PATIENCE_S
        while self._live() != count:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def _live(self) -> int:
        state = httpx.get(f"{self.url}/server_info", timeout=PATIENCE_S).json()["internal_states"][0]
        return int(state["live_requests"])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def socket_directories(self) -> list[Path]:
        """Socket directories that are left."""
        return list(self.tmp.glob("losa-*"))
