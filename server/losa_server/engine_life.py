"""One life of the engine: the process, the two sockets to it, and the watch over both. Knows no requests.

Its end is told once, whatever it was: the process has exited, it has said that it failed, it has gone silent, or it
hangs. Whoever owns a life then closes it; after that nothing of it is left, no process and no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from losa_runtime.core.config import EngineConfig
from losa_server.channel import AsyncReceiver, AsyncSender, SocketDirectory, checked
from losa_server.errors import EngineUnavailable
from losa_server.keys import SECRET_VARIABLES
from losa_server.messages import (
    TO_ENGINE,
    TO_FRONTEND,
    EngineFailed,
    EngineReady,
    EngineStart,
    Heartbeat,
    Message,
    Shutdown,
)
from losa_server.settings import ServerSettings
from losa_server.spinning import spins_briefly
from losa_server.vigil import Vigil

log = logging.getLogger("losa.server")

ENGINE_COMMAND = (sys.executable, "-P", "-m", "losa_server.engine_process")
BEATS_PER_TIMEOUT = 8  # so many heartbeats must be lost in a row
WATCH_S = 0.2
# What a process has sent before its end may still be in the socket, and says more than an exit code; one that hangs is
# asked to write its stacks to the log.
LAST_WORDS_S = 0.1


class EngineLife:
    """Made in the event loop that it is used in. `connect` or `start` first; `close` last.

    on_message: gets every message but heartbeats. on_end: called once, with the reason, unless `close` came first.
    """

    def __init__(self, on_message: Callable[[Message], None], on_end: Callable[[str], None]) -> None:
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.ended: str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._on_message, self._on_end = on_message, on_end
        self._closing = False
        self._vigil: Vigil | None = None
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> bool:
        """True while there is an engine that has loaded and not ended."""
        return self.ready.done() and self.ended is None and not self._closing

    @property
    def malformed(self) -> int:
        """Frames from the engine that were dropped."""
        return self._receiver.inbox.malformed

    def connect(self) -> SocketDirectory:
        """Make the socket directory, bind both sockets, start to read and write. Returns the directory."""
        self._directory = SocketDirectory()
        self._sender = AsyncSender(self._directory.address(TO_ENGINE))
        self._receiver = AsyncReceiver(self._directory.address(TO_FRONTEND), TO_FRONTEND)
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]
        return self._directory

    def start(self, config: EngineConfig, parent: int, settings: ServerSettings, command: Sequence[str]) -> None:
        """Connect, then start the engine process. command: what to run; it reads an EngineStart from its stdin."""
        directory = self.connect()
        start = EngineStart(
            config=config,
            to_engine=directory.address(TO_ENGINE),
            to_frontend=directory.address(TO_FRONTEND),
            parent=parent,
            beat_s=settings.heartbeat_timeout / BEATS_PER_TIMEOUT,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        environment = spins_briefly(environment)
        loop = asyncio.get_running_loop()
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        except OSError as error:
            loop.call_soon(self._end, f"its process could not be started: {error}")
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended at once; the sentinel says so
            process.stdin.write(start.model_dump_json().encode())
            process.stdin.close()
        self.process = process
        self._vigil = Vigil(settings.heartbeat_timeout, settings.watchdog_timeout)
        self._tasks.append(asyncio.create_task(self._watch(self._vigil)))

        def sentinel() -> None:
            code = process.wait()
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody wants to know any more
                loop.call_soon_threadsafe(loop.call_later, LAST_WORDS_S, self._end, f"it ended with {_exit(code)}")

        threading.Thread(target=sentinel, name="engine-sentinel", daemon=True).start()

    def post(self, message: Message) -> None:
        """Send a message, in order; never waits. Raises MessageTooLarge."""
        self._outbox.put_nowait(checked(message))

    async def close(self, grace_s: float = 2.0) -> None:
        """End the engine: asked first, then SIGTERM, then SIGKILL, each after `grace_s`. Removes the sockets."""
        reads_messages, self._closing = self.up, True
        process = self.process
        if process is not None:
            await self._end_process(process, reads_messages, grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sender.close()
        self._receiver.close()
        self._directory.remove()
        if not self.ready.done():
            self.ready.cancel()

    async def _end_process(self, process: subprocess.Popen[bytes], reads_messages: bool, grace_s: float) -> None:
        if self.ended is not None and await _wait_exit(process, LAST_WORDS_S):
            return
        polite = [lambda: self.post(Shutdown())] if reads_messages else []
        for end in [*polite, process.terminate] if self.ended is None else []:
            end()
            if await _wait_exit(process, grace_s):
                return
        process.kill()
        await _wait_exit(process, grace_s)

    # -- what happens -----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            await self._sender.send(await self._outbox.get())

    async def _read(self) -> None:
        while self.ended is None:
            message = await self._receiver.receive()
            if message is None:
                continue
            try:
                self._take(message)
            except Exception:
                log.exception("a %s message could not be handled", type(message).__name__)

    def _take(self, message: Message) -> None:
        if self._vigil is not None:
            self._vigil.heard(message.stalled_s if isinstance(message, Heartbeat) else None)
        match message:
            case Heartbeat():
                pass
            case EngineReady(info=info):
                if self._vigil is not None:
                    self._vigil.ready()
                self._on_message(message)
                if not self.ready.done():
                    self.ready.set_result(info)
            case EngineFailed(message=reason):
                self._end(reason)
            case _:
                self._on_message(message)

    async def _watch(self, vigil: Vigil) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        while self.ended is None:
            await asyncio.sleep(WATCH_S)
            # While this process could not run itself, e.g. was stopped, nobody could be heard: that does not count.
            now = loop.time()
            wrong = vigil.passed(min(now - before, 2 * WATCH_S))
            before = now
            if wrong is not None:
                if self.process is not None:
                    self.process.send_signal(signal.SIGUSR1)  # its stacks, into the log
                self._end(wrong)

    def _end(self, reason: str) -> None:
        if self._closing or self.ended is not None:
            return
        self.ended = reason
        if not self.ready.done():
            self.ready.set_exception(EngineUnavailable(reason))
            self.ready.exception()  # whoever waits for it is told; nobody has to
        self._on_end(reason)


async def _wait_exit(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while process.poll() is None:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
