"""The HTTP process's side of one engine life: the process, its sockets, and who waits for which answer.

Sends and receives messages and hands each answer to the one that waits for it. When the engine ends, by message or by
death, everybody who waits is told at once. Knows neither HTTP nor tokens; one object serves one engine life.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.request import Request, RequestOutput
from losa_server.channel import AsyncReceiver, AsyncSender, MessageTooLarge, SocketDirectory, checked
from losa_server.errors import EngineUnavailable, RequestFailed
from losa_server.logs import LogFormat
from losa_server.mailbox import Mailbox
from losa_server.messages import (
    TO_ENGINE,
    TO_FRONTEND,
    AbortRequest,
    EngineFailed,
    EngineReady,
    EngineStart,
    EngineStats,
    FlushCache,
    FlushDone,
    GenerateRequest,
    GetStats,
    Message,
    RequestError,
    Shutdown,
    TokenOutputs,
)

log = logging.getLogger("losa.server")

ENGINE_COMMAND = (sys.executable, "-P", "-m", "losa_server.engine_process")


class EngineClient:
    """One engine life. `connect` or `start` first, then `wait_ready`; `close` last, from the same event loop.

    on_death: called once, in the event loop, with the reason, when a ready engine ends unasked.
    """

    def __init__(self, on_death: Callable[[str], None] | None = None) -> None:
        self.info: dict[str, Any] = {}
        self.failure: str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.unknown_outputs = 0  # news for requests that nobody waits for any more
        self.report: dict[str, Any] = {}  # the engine's last unasked stats; empty before the first
        self.reported_at: float | None = None  # time.monotonic() of its arrival
        self._on_death = on_death
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._closing = False
        self._refusal: str | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._tickets: dict[int, asyncio.Future[Any]] = {}
        self._next_ticket = itertools.count(1)
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    # -- life -------------------------------------------------------------------------------------------------------

    def connect(self) -> SocketDirectory:
        """Make the socket directory, bind both sockets, start to read and write. Returns the directory."""
        self.directory = SocketDirectory()
        self._sender = AsyncSender(self.directory.address(TO_ENGINE))
        self._receiver = AsyncReceiver(self.directory.address(TO_FRONTEND), TO_FRONTEND)
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]
        return self.directory

    def start(
        self,
        config: EngineConfig,
        parent: int,
        log_level: str,
        command: Sequence[str] = ENGINE_COMMAND,
        log_format: LogFormat = "text",
    ) -> None:
        """Connect, then start the engine process. command: what to run; it reads an EngineStart from its stdin."""
        directory = self.connect()
        start = EngineStart(
            config=config,
            to_engine=directory.address(TO_ENGINE),
            to_frontend=directory.address(TO_FRONTEND),
            parent=parent,
            log_level=log_level,
            log_format=log_format,
        )
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(start.model_dump_json().encode())
        process.stdin.close()
        self.process = process
        loop = asyncio.get_running_loop()

        def watch() -> None:
            code = process.wait()
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._process_ended, code)

        threading.Thread(target=watch, name="watch-engine", daemon=True).start()

    async def wait_ready(self) -> dict[str, Any]:
        """The engine's facts, once it has loaded. Raises EngineUnavailable with the reason if it could not."""
        ready, ended = asyncio.create_task(self._ready.wait()), asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            ended.cancel()
        if self.failure is not None:
            raise EngineUnavailable(self.failure)
        return self.info

    @property
    def healthy(self) -> bool:
        """True while there is an engine that has loaded and not ended."""
        return self._ready.is_set() and self.failure is None and not self._closing and self._refusal is None

    @property
    def unavailable_because(self) -> str:
        """Why `healthy` is False, in words."""
        return self.failure or self._refusal or "the engine is not ready"

    def refuse(self, reason: str) -> None:
        """Take no more requests and end the waiting ones, while the engine itself stays up."""
        self._refusal = reason
        self.fail_all(EngineUnavailable(reason))

    def fail_all(self, failure: RequestFailed) -> None:
        """End every waiting request and question with this error."""
        for mailbox in self._mailboxes.values():
            mailbox.fail(failure)
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(failure)

    async def close(self, grace_s: float = 2.0) -> None:
        """End the engine: asked first, then SIGTERM, then SIGKILL, each after `grace_s`. Removes the sockets."""
        reads_messages, self._closing = self._ready.is_set() and self.failure is None, True
        self.fail_all(EngineUnavailable("the server is shutting down"))
        process = self.process
        if process is not None and process.poll() is None:
            polite: list[Callable[[], None]] = [lambda: self._post(Shutdown())] if reads_messages else []
            for end in (*polite, process.terminate, process.kill):
                end()
                if await _wait_exit(process, grace_s):
                    break
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sender.close()
        self._receiver.close()
        self.directory.remove()

    # -- questions --------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> list[Mailbox]:
        """Send requests together; the caller must `release` each rid. Raises EngineUnavailable, RequestFailed (413)."""
        self._require_healthy()
        self._post(GenerateRequest(requests=tuple(requests)))
        mailboxes = {request.rid: Mailbox() for request in requests}
        self._mailboxes |= mailboxes
        return list(mailboxes.values())

    def release(self, rid: str, finished: bool) -> None:
        """Forget a request; unless it has finished, the engine is told to abort it. Never waits, never raises."""
        if self._mailboxes.pop(rid, None) is not None and not finished and self.healthy:
            self._post(AbortRequest(rid=rid))

    def abort(self, rid: str) -> None:
        """Ask the engine to end a request; its waiter gets the engine's last output of it."""
        if self.healthy:
            self._post(AbortRequest(rid=rid))

    @property
    def malformed_messages(self) -> int:
        """Frames from the engine that were dropped."""
        return self._receiver.inbox.malformed

    async def stats(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """The engine's counters. Raises EngineUnavailable, also when the engine does not answer in time."""
        ticket = next(self._next_ticket)
        answer: EngineStats = await self._ask(GetStats(ticket=ticket), ticket, timeout_s)
        return answer.stats

    async def flush_cache(self, timeout_s: float = 30.0) -> bool:
        """Forget cached prefixes; False when requests are pending. Raises EngineUnavailable."""
        ticket = next(self._next_ticket)
        answer: FlushDone = await self._ask(FlushCache(ticket=ticket), ticket, timeout_s)
        return answer.flushed

    async def _ask(self, question: Message, ticket: int, timeout_s: float) -> Any:
        self._require_healthy()
        future = self._tickets[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._post(question)
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise EngineUnavailable(f"the engine did not answer within {timeout_s:g} s") from None
        finally:
            del self._tickets[ticket]

    def _require_healthy(self) -> None:
        if not self.healthy:
            raise EngineUnavailable(self.unavailable_because)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _post(self, message: Message) -> None:
        try:
            self._outbox.put_nowait(checked(message))
        except MessageTooLarge as error:
            raise RequestFailed(413, f"the request is too large for the engine: {error}") from None

    async def _write(self) -> None:
        while True:
            await self._sender.send(await self._outbox.get())

    async def _read(self) -> None:
        while True:
            message = await self._receiver.receive()
            if message is None:
                continue
            try:
                self._handle(message)
            except Exception:
                log.exception("a %s message could not be handled", type(message).__name__)

    def _handle(self, message: Message) -> None:
        match message:
            case TokenOutputs(outputs=outputs):
                for output in outputs:
                    self._deliver(output)
            case RequestError(rid=rid):
                mailbox = self._mailboxes.get(rid)
                if mailbox is not None:
                    mailbox.fail(RequestFailed(message.status_code, message.message, message.field))
            case EngineStats(ticket=0, stats=stats):
                self.report, self.reported_at = stats, time.monotonic()
            case EngineStats(ticket=ticket) | FlushDone(ticket=ticket):
                future = self._tickets.get(ticket)
                if future is not None and not future.done():
                    future.set_result(message)
            case EngineReady(info=info):
                self.info = info
                self._ready.set()
            case EngineFailed(message=reason):
                self._fail(reason)

    def _deliver(self, output: RequestOutput) -> None:
        mailbox = self._mailboxes.get(output.rid)
        if mailbox is None:
            self.unknown_outputs += 1
        else:
            mailbox.put(output)

    def _process_ended(self, code: int) -> None:
        # Its last messages may still be in the socket; they hold better reasons than an exit code.
        asyncio.get_running_loop().call_later(0.1, self._fail, f"the engine process ended with {_exit(code)}")

    def _fail(self, reason: str) -> None:
        if self._closing or self.failure is not None:
            return
        self.failure = reason
        self._ended.set()
        self.fail_all(EngineUnavailable(f"the engine is gone: {reason}"))
        if self._ready.is_set():
            log.error("the engine is gone: %s", reason)
            if self._on_death is not None:
                self._on_death(reason)


async def _wait_exit(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while process.poll() is None:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
