"""The HTTP process's side of rendering: a few processes, started when they are first needed, killed when they hang.

A thread could not be stopped, and the sandbox bounds neither time nor memory: so a conversation that a template cannot
finish costs its own client an error and one process, and nobody else anything.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from losa_runtime.core.errors import InvalidRequest
from losa_server.errors import RequestFailed
from losa_server.rendering.process import HEADER, Setup, frame

COMMAND = (sys.executable, "-P", "-m", "losa_server.rendering.process")
START_S = 60.0  # a process imports little, but the machine may be busy
# What a process gets of our environment: nothing that is secret.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class Renderer:
    """Renders conversations with one template. `close` last, from the same event loop.

    template, names: see ChatTemplate. specials: spellings of special tokens. seconds: for one conversation.
    workers: processes at most.
    """

    def __init__(
        self, template: str, names: Mapping[str, str], specials: Sequence[str], seconds: float, workers: int = 2
    ) -> None:
        self._setup = Setup(template, dict(names), list(specials), seconds)
        self._seconds = seconds
        self._room = asyncio.Semaphore(workers)
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._variables: frozenset[str] | None = None
        self._broken: InvalidRequest | None = None

    async def variables(self) -> frozenset[str]:
        """The names that the template reads, e.g. `tools`. Raises InvalidRequest for a broken template."""
        if self._variables is None:
            async with self._room:
                self._idle.append(await self._worker())
        assert self._variables is not None
        return self._variables

    async def render(self, conversation: Mapping[str, Any]) -> list[str]:
        """The text of a conversation, in pieces that are to be tokenized one by one (see `guard`).

        conversation: the arguments of `ChatTemplate.render`. Raises InvalidRequest for what cannot be rendered, also
        not in time, and RequestFailed if the process ended.
        """
        async with self._room:
            worker = await self._worker()
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await worker.ask(conversation)
            except TimeoutError:
                self._end(worker)
                allowed = f"one that the chat template renders within {self._seconds:g} s"
                raise InvalidRequest("messages", "a conversation", allowed) from None
            except (EOFError, ConnectionError):
                self._end(worker)
                raise RequestFailed(500, "the process that renders chat templates has ended") from None
            except BaseException:  # the client has left: its answer must not become somebody else's
                self._end(worker)
                raise
            self._idle.append(worker)
        return _pieces(answer)

    async def close(self) -> None:
        """End all processes."""
        for worker in list(self._workers):
            self._end(worker)
        await asyncio.gather(*self._ending)

    async def _worker(self) -> _Worker:
        """An idle process, or a new one; the caller holds a place in the room."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            self._end(worker)
        if self._broken is not None:
            raise self._broken
        worker = await _Worker.start()
        self._workers.add(worker)
        try:
            async with asyncio.timeout(START_S):
                answer = await worker.ask(tuple(self._setup))
            self._variables = frozenset(answer["variables"])
        except KeyError:
            self._broken = InvalidRequest(answer["field"], answer["found"], answer["allowed"])
            self._end(worker)
            raise self._broken from None
        except (EOFError, ConnectionError, TimeoutError):
            self._end(worker)
            raise RequestFailed(500, "the process that renders chat templates could not start") from None
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        ending = asyncio.create_task(worker.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


class _Worker:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        self._source, self._sink = process.stdout, process.stdin

    @classmethod
    async def start(cls) -> _Worker:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*COMMAND, stdin=pipe, stdout=pipe, env=environment))

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, value: Any) -> Any:
        """Send a value and wait for the answer. Raises EOFError or ConnectionError if the process has ended."""
        self._sink.write(frame(value))
        await self._sink.drain()
        (size,) = HEADER.unpack(await self._source.readexactly(HEADER.size))
        return orjson.loads(await self._source.readexactly(size))

    async def end(self) -> None:
        """Kill it and wait for its end; harmless when it has ended."""
        if self.alive:
            self._process.kill()
        await self._process.wait()


def _pieces(answer: dict[str, Any]) -> list[str]:
    if "pieces" not in answer:
        raise InvalidRequest(answer["field"], answer["found"], answer["allowed"])
    pieces: list[str] = answer["pieces"]
    return pieces
