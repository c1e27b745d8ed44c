"""Constraints made ready for the engine, which would let everybody wait: known ones at once, new ones a few at a time.

Patterns that take their whole time hold up other new ones only, and not many of those. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.compiler import Compiler
from losa_runtime.grammar.guide import constraint, constraint_pattern
from losa_server.errors import RequestFailed

MOST = 4  # new patterns at once; the last one waits for the others


class Compiling:
    """A compiler with threads of its own, so that nothing else waits for one. Lives in an event loop."""

    def __init__(self, compiler: Compiler | None = None) -> None:
        self._compiler = compiler or Compiler()
        self._threads = ThreadPoolExecutor(MOST, thread_name_prefix="compile")
        self._free = threading.BoundedSemaphore(MOST)

    async def automaton(self, sampling: SamplingParams) -> bytes | None:
        """What `Guides.make` wants of a request, None if it asks for no constraint.

        Raises InvalidRequest, and RequestFailed (503) while too many new patterns are being compiled.
        """
        asked = constraint(sampling)
        if asked is None:
            return None
        pattern = await asyncio.to_thread(constraint_pattern, sampling)
        found = self._compiler.recall((pattern, sampling.stop))
        if found is None:
            found = await self._compiled(pattern, asked[0], sampling.stop)
        return found.to_bytes()

    async def _compiled(self, pattern: str, field: str, without: tuple[str, ...]) -> ByteAutomaton:
        if not self._free.acquire(blocking=False):
            raise RequestFailed(503, f"{MOST} new patterns are being compiled, at most {MOST} may; try again later")
        future = self._threads.submit(self._compiler.compile, pattern, field, without)
        future.add_done_callback(lambda _: self._free.release())  # also when nobody waits for it any more
        return await asyncio.wrap_future(future)

    @property
    def stats(self) -> dict[str, int]:
        """Automata that are remembered, and their bytes."""
        count, size = self._compiler.remembered
        return {"patterns": count, "pattern_bytes": size}
