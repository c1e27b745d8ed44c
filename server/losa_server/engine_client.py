"""What the HTTP process asks of the engine, and who waits for which answer, from one engine life to the next.

Sends messages and hands each answer to the one that waits for it. When an engine is lost, everybody who waits is told
at once: what one engine was asked is never answered by another. Knows neither HTTP nor tokens, nor how engines start.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

from losa_runtime.core.request import Request, RequestOutput
from losa_server.channel import MessageTooLarge, SocketDirectory
from losa_server.engine_life import EngineLife
from losa_server.errors import EngineUnavailable, RequestFailed
from losa_server.mailbox import Mailbox
from losa_server.messages import (
    AbortRequest,
    EngineLoad,
    EngineReady,
    EngineStats,
    FlushCache,
    FlushDone,
    GenerateRequest,
    GetStats,
    Message,
    RequestError,
    TokenOutputs,
)
from losa_server.queue_view import QueueView

log = logging.getLogger("losa.server")


class EngineClient:
    """The face of whatever engine there is. Lives in one event loop. A supervisor gives it a `life` and tells of its
    end with `lost`; for an engine that somebody else runs, `connect` makes one.
    """

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.unknown_outputs = 0  # news for requests that nobody waits for any more
        self.report: dict[str, Any] = {}  # the engine's last unasked stats; empty before the first
        self.reported_at: float | None = None  # time.monotonic() of its arrival
        self.restarts = 0  # engines that were lost and replaced
        self.queue = QueueView()
        self._life: EngineLife | None = None
        self._trouble = "the engine is not ready"
        self._draining: str | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._tickets: dict[int, asyncio.Future[Any]] = {}
        self._next_ticket = itertools.count(1)
        self._malformed = 0  # of earlier lives

    # -- life -------------------------------------------------------------------------------------------------------

    def attach(self, life: EngineLife) -> None:
        """From now on, this is the engine."""
        self._life, self.queue = life, QueueView()

    def lost(self, reason: str) -> None:
        """The engine is gone, or about to be killed: whoever waits for it gets an error now."""
        if self._life is not None:
            self._malformed += self._life.malformed
        self._life, self._trouble, self.report, self.reported_at = None, f"the engine is gone: {reason}", {}, None
        self.fail_all(EngineUnavailable(self._trouble))

    def connect(self) -> SocketDirectory:
        """A life without a process: sockets for an engine that somebody else runs."""
        life = EngineLife(self.take, self.lost)
        directory = life.connect()
        self.attach(life)
        return directory

    async def wait_ready(self) -> dict[str, Any]:
        """The engine's facts, once it has loaded. Raises EngineUnavailable with the reason if it could not."""
        assert self._life is not None
        return await asyncio.shield(self._life.ready)

    async def close(self) -> None:
        """End what waits, and the life that `connect` made."""
        self.fail_all(EngineUnavailable("the server is shutting down"))
        if self._life is not None:
            life, self._life = self._life, None
            await life.close()

    # -- states -----------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """True while requests are taken: there is an engine that has loaded, and nobody has asked to stop."""
        return self._draining is None and self._life is not None and self._life.up

    @property
    def unavailable_because(self) -> str:
        """Why `healthy` is False, in words."""
        return self._draining or self._trouble

    @property
    def live(self) -> int:
        """Requests that were accepted and not released yet."""
        return len(self._mailboxes)

    def drain(self, reason: str) -> None:
        """Take no more requests; those that were accepted go on."""
        self._draining = self._draining or reason

    def refuse(self, reason: str) -> None:
        """Take no more requests and end the waiting ones, while the engine itself stays up."""
        self.drain(reason)
        self.fail_all(EngineUnavailable(reason))

    def fail_all(self, failure: RequestFailed) -> None:
        """End every waiting request and question with this error."""
        for mailbox in self._mailboxes.values():
            mailbox.fail(failure)
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(failure)

    # -- questions --------------------------------------------------------------------------------------------------

    def require_room(self, count: int) -> None:
        """Raises EngineUnavailable if the engine would refuse so many more requests now, RequestFailed (400) if it
        always would. Costs nothing: ask before any work is done for them."""
        if not self.healthy:
            raise EngineUnavailable(self.unavailable_because)
        limit = self.queue.limit
        if limit is not None and count > limit:
            raise RequestFailed(400, f"one call: found {count} prompts, allowed: at most {limit}, the queue's length")
        if not self.queue.has_room(count):
            raise EngineUnavailable(f"{self.queue.length} requests are waiting, at most {limit} may; try again later")

    def submit(self, requests: Sequence[Request]) -> list[Mailbox]:
        """Send requests together; the caller must `release` each rid. Raises EngineUnavailable, RequestFailed (413)."""
        self.require_room(len(requests))
        self._post(GenerateRequest(requests=tuple(requests)))
        self.queue.sent(len(requests))
        mailboxes = {request.rid: Mailbox() for request in requests}
        self._mailboxes |= mailboxes
        return list(mailboxes.values())

    def release(self, rid: str, finished: bool) -> None:
        """Forget a request; unless it has finished, the engine is told to abort it. Never waits, never raises."""
        if self._mailboxes.pop(rid, None) is not None and not finished:
            self.abort(rid)

    def abort(self, rid: str) -> None:
        """Ask the engine to end a request; its waiter gets the engine's last output of it."""
        if self._life is not None and self._life.up:
            self._post(AbortRequest(rid=rid))

    @property
    def malformed_messages(self) -> int:
        """Frames from engines that were dropped."""
        return self._malformed + (0 if self._life is None else self._life.malformed)

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
        future = self._tickets[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._post(question)
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise EngineUnavailable(f"the engine did not answer within {timeout_s:g} s") from None
        finally:
            del self._tickets[ticket]

    # -- messages ---------------------------------------------------------------------------------------------------

    def _post(self, message: Message) -> None:
        if self._life is None or not self._life.up:
            raise EngineUnavailable(self._trouble)
        try:
            self._life.post(message)
        except MessageTooLarge as error:
            raise RequestFailed(413, f"the request is too large for the engine: {error}") from None

    def take(self, message: Message) -> None:
        """Hand a message of the engine to the one that waits for it."""
        match message:
            case TokenOutputs(outputs=outputs):
                for output in outputs:
                    self._deliver(output)
            case RequestError(rid=rid):
                mailbox = self._mailboxes.get(rid)
                if mailbox is not None:
                    mailbox.fail(RequestFailed(message.status_code, message.message, message.field))
            case EngineLoad():
                self.queue.told(message.received, message.waiting)
            case EngineStats(ticket=0, stats=stats):
                self.report, self.reported_at = stats, time.monotonic()
            case EngineStats(ticket=ticket) | FlushDone(ticket=ticket):
                future = self._tickets.get(ticket)
                if future is not None and not future.done():
                    future.set_result(message)
            case EngineReady(info=info):
                self.info = info
                self.queue.limit = info.get("max_queued_requests")

    def _deliver(self, output: RequestOutput) -> None:
        mailbox = self._mailboxes.get(output.rid)
        if mailbox is None:
            self.unknown_outputs += 1
        else:
            mailbox.put(output)
