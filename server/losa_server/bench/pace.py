"""When programs start: in a closed loop whenever one has ended, in an open one by a clock that does not care."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import nullcontext

from losa_server.bench.calls import Caller, Program


async def closed_loop(programs: Iterable[Program], caller: Caller, concurrency: int, done: Callable[[], None]) -> None:
    """At most `concurrency` programs at once, and always as many as there are."""
    queue = iter(programs)

    async def worker() -> None:
        for program in queue:
            await program(caller)
            done()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def open_loop(
    programs: Iterable[Program],
    caller: Caller,
    rate: float,
    rng: random.Random,
    concurrency: int | None,
    done: Callable[[], None],
    burst: int = 1,
) -> None:
    """A Poisson process of `rate` arrivals per second, `burst` at a time. Those beyond `concurrency` wait for room."""
    room = asyncio.Semaphore(concurrency) if concurrency else nullcontext()

    async def run(program: Program) -> None:
        async with room:
            await program(caller)
        done()

    async with asyncio.TaskGroup() as group:
        async for program in _arrivals(programs, rate, rng, burst):
            group.create_task(run(program))


async def _arrivals(programs: Iterable[Program], rate: float, rng: random.Random, burst: int) -> AsyncIterator[Program]:
    """Each program at its time. Times are absolute, so that a late wake-up does not make all later ones late."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number, program in enumerate(programs, 1):
        await asyncio.sleep(max(0.0, due - loop.time()))
        yield program
        if number % burst == 0:
            due += rng.expovariate(rate / burst)
