"""The loop of the engine process: messages in, steps, messages out. Knows the engine's face, not how it is made.

Whatever happens here, each request that was taken in gets exactly one ending: from the engine, or from this loop when
the engine fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Protocol

import psutil

from losa_runtime.core.errors import EngineBroken, LosaError
from losa_runtime.core.request import Request, RequestOutput
from losa_server.channel import ChannelBusy, MessageTooLarge, Receiver, Sender
from losa_server.errors import as_failure
from losa_server.messages import (
    AbortRequest,
    EngineFailed,
    EngineLoad,
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
from losa_server.pulse import WorkClock

log = logging.getLogger("losa.engine")

IDLE_POLL_S = 0.2  # also how long a stop signal may go unnoticed while idle
REPORT_S = 1.0  # between two unasked reports; a scrape of metrics reads the last one and never waits for a step
MESSAGES_PER_ROUND = 512  # so that a flood of arrivals cannot keep running requests from their next step


class EngineFace(Protocol):
    """What this loop needs of an engine; `losa_runtime.engine.Engine` has it, and so may a test's stand-in."""

    @property
    def forwards(self) -> int: ...  # that have come to their end
    @property
    def queued(self) -> int: ...  # requests that wait for their admission
    def add(self, request: Request) -> None: ...
    def abort(self, rid: str) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def has_work(self) -> bool: ...
    def rest(self) -> None: ...
    def flush_cache(self) -> bool: ...
    def info(self) -> dict[str, object]: ...
    def stats(self) -> dict[str, object]: ...


class EngineReport:
    """An engine's counters and what has happened since the last report. tokens: generated ones; the owner counts."""

    def __init__(self) -> None:
        self.tokens = 0
        self._since = time.monotonic()
        self._before = (0, 0)

    def make(self, stats: dict[str, object]) -> dict[str, object]:
        """`stats` and the rates of the time since the last call."""
        now, tokens = time.monotonic(), (stats.get("prompt_tokens"), stats.get("cached_tokens"))
        prompt, cached = (value if isinstance(value, int) else 0 for value in tokens)
        new_prompt, new_cached = prompt - self._before[0], cached - self._before[1]
        rates = {
            "gen_throughput": self.tokens / max(now - self._since, 1e-9),
            "recent_hit_rate": new_cached / new_prompt if new_prompt else 0.0,
        }
        self.tokens, self._since, self._before = 0, now, (prompt, cached)
        return {**stats, **rates}


class EngineLoop:
    """Moves messages and steps until told to stop. `run` returns the exit code of the process.

    clock: is told of every step, so that a hanging one shows.
    """

    def __init__(self, engine: EngineFace, receiver: Receiver, sender: Sender, clock: WorkClock | None = None) -> None:
        self._engine, self._receiver, self._sender = engine, receiver, sender
        self._clock = clock or WorkClock()
        self._live: set[str] = set()
        self._stopping = False
        self._report, self._next_report = EngineReport(), 0.0
        self._received = 0
        self._busy_s = 0.0
        self._load = EngineLoad(received=0, waiting=0)

    def stop(self) -> None:
        """Ask the loop to end after the current step; safe to call from a signal handler."""
        self._stopping = True

    def run(self) -> int:
        """0 after a Shutdown message or `stop`, 1 after a failure (which every live request has been told of)."""
        try:
            while not self._stopping:
                began = time.perf_counter()
                idle = not self._engine.has_work()
                self._take_messages()
                if idle:  # what it waited for is not work
                    began = time.perf_counter()
                if self._engine.has_work() and not self._stopping:
                    self._step()
                    self._tell()
                    self._busy_s += time.perf_counter() - began
                else:
                    self._tell()
        except EngineBroken as error:
            log.error("%s", error)
            self._fail_all(str(error), error.suspects)
            return 1
        except Exception as error:
            log.exception("the engine failed")
            self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
            return 1
        return 0

    def _stats(self) -> dict[str, object]:
        """The engine's counters and this process's. busy_s: seconds with requests at hand; what of them is not
        forward_s was the host's. cpu_s: of all threads."""
        about = {"cpu_s": time.process_time(), "engine_rss_bytes": psutil.Process().memory_info().rss}
        return {**self._engine.stats(), "busy_s": self._busy_s, **about}

    def _step(self) -> None:
        self._clock.note(True, self._engine.forwards)
        self._send_outputs(self._engine.step())
        busy = self._engine.has_work()
        self._clock.note(busy, self._engine.forwards)
        if not busy:
            self._engine.rest()

    def _tell(self) -> None:
        """What the HTTP process should know without asking."""
        load = EngineLoad(received=self._received, waiting=self._engine.queued)
        if load != self._load:
            self._load = load
            self._sender.send(load)
        if time.monotonic() >= self._next_report:
            stats = {**self._stats(), "malformed_messages": self._receiver.inbox.malformed}
            self._sender.send(EngineStats(ticket=0, stats=self._report.make(stats)))
            self._next_report = time.monotonic() + REPORT_S

    def _take_messages(self) -> None:
        wait_s = 0.0 if self._engine.has_work() else IDLE_POLL_S
        for _ in range(MESSAGES_PER_ROUND):
            message = self._receiver.receive(wait_s)
            if message is not None:
                self._handle(message)
            if self._stopping or not self._receiver.waiting():
                return
            wait_s = 0.0

    def _handle(self, message: Message) -> None:
        match message:
            case GenerateRequest(requests=requests):
                for request in requests:
                    self._add(request)
            case AbortRequest(rid=rid):
                self._engine.abort(rid)
            case FlushCache(ticket=ticket):
                self._sender.send(FlushDone(ticket=ticket, flushed=self._engine.flush_cache()))
            case GetStats(ticket=ticket):
                self._sender.send(EngineStats(ticket=ticket, stats=self._stats()))
            case Shutdown():
                self.stop()

    def _add(self, request: Request) -> None:
        self._received += 1
        if request.rid in self._live:
            log.error("request id %s is in use; the second request was dropped", request.rid)
            return
        try:
            self._engine.add(request)
        except LosaError as error:
            failure = as_failure(error)
            self._refuse(request.rid, failure.status_code, failure.message, failure.field)
        except Exception as error:
            # The engine never saw this request run, so the others go on.
            log.exception("adding request %s failed", request.rid)
            self._refuse(request.rid, 500, f"the engine could not take the request: {type(error).__name__}", None)
        else:
            self._live.add(request.rid)

    def _refuse(self, rid: str, status_code: int, message: str, field: str | None) -> None:
        self._sender.send(RequestError(rid=rid, status_code=status_code, message=message, field=field))

    def _send_outputs(self, outputs: list[RequestOutput]) -> None:
        self._live.difference_update(output.rid for output in outputs if output.finish is not None)
        self._report.tokens += sum(len(output.token_ids) for output in outputs)
        if not outputs:
            return
        try:
            self._sender.send(TokenOutputs.of(outputs))
        except MessageTooLarge:
            for output in outputs:
                self._send_alone(output)

    def _send_alone(self, output: RequestOutput) -> None:
        try:
            self._sender.send(TokenOutputs.of([output]))
        except MessageTooLarge as error:
            log.error("the answer to %s cannot be sent: %s", output.rid, error)
            self._engine.abort(output.rid)
            self._refuse(output.rid, 500, f"the answer is too large: {error}", None)

    def _fail_all(self, message: str, suspects: Collection[str] = ()) -> None:
        """Tell everybody. Who was not part of what failed may try again elsewhere (503); a suspect had better not
        (500), or a router would take it from one engine to the next."""
        try:
            for rid in self._live:
                self._refuse(rid, 500 if rid in suspects else 503, message, None)
            self._sender.send(EngineFailed(message=message))
        except ChannelBusy:
            log.error("the HTTP process does not read; its clients learn of the failure from the end of this process")
