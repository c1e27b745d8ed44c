"""Constraints are compiled a few at a time; what is known, and what asks for none, waits for nobody."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.compile_worker import compile_pattern
from losa_runtime.grammar.compiler import Asked, Compiler
from losa_server.compiling import MOST, Compiling
from losa_server.errors import RequestFailed


class Slow:
    """A compiler that is done when it is told, knows `known`, and refuses what is called bad."""

    remembered = (1, 10)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.made = compile_pattern("known")

    def recall(self, asked: Asked) -> ByteAutomaton | None:
        return self.made if asked == ("known", ()) else None

    def compile(self, pattern: str, field: str, without: tuple[str, ...]) -> ByteAutomaton:
        assert self.go.wait(30)
        if pattern == "bad":
            raise InvalidRequest(field, pattern, "another one")
        return self.made


async def until(done: Any) -> None:
    while not done():
        await asyncio.sleep(0.001)


def test_new_patterns_wait_in_a_short_queue_and_nothing_else_waits() -> None:
    async def story() -> None:
        slow = Slow()
        compiling = Compiling(cast(Compiler, slow))
        new = [
            asyncio.create_task(compiling.automaton(SamplingParams(regex=name)))
            for name in ("bad", *"abcdefgh"[: MOST - 1])
        ]
        await until(lambda: compiling._free._value == 0)  # type: ignore[attr-defined]
        with pytest.raises(RequestFailed, match="new patterns are being compiled") as full:
            await compiling.automaton(SamplingParams(regex="one more"))
        assert full.value.status_code == 503
        assert await compiling.automaton(SamplingParams(regex="known")) == slow.made.to_bytes()
        assert await compiling.automaton(SamplingParams()) is None
        with pytest.raises(InvalidRequest, match="not"):
            await compiling.automaton(SamplingParams(json_schema='{"not": {}}'))
        new[-1].cancel()  # its place is free again only when its work is over
        await asyncio.sleep(0)
        with pytest.raises(RequestFailed):
            await compiling.automaton(SamplingParams(regex="one more"))
        slow.go.set()
        found = await asyncio.gather(*new, return_exceptions=True)
        assert isinstance(found[0], InvalidRequest) and isinstance(found[-1], asyncio.CancelledError)
        assert found[1:-1] == [slow.made.to_bytes()] * (MOST - 2)
        await until(lambda: compiling._free._value == MOST)  # type: ignore[attr-defined]
        assert await compiling.automaton(SamplingParams(regex="one more")) == slow.made.to_bytes()
        assert compiling.stats == {"patterns": 1, "pattern_bytes": 10}

    asyncio.run(asyncio.wait_for(story(), 60))
