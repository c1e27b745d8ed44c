"""What a client that leaves had in the engine is free two steps later, wherever in its life it left."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from losa_runtime.core.config import EngineConfig
from losa_runtime.engine import Engine
from tests.engine.leftovers import leftovers
from tests.server.app_server import AppServer
from tests.server.gated_engine import GatedEngine

PROMPT = [66 + (7 * i) % 150 for i in range(90)]


@pytest.fixture(scope="module")
def gated(tiny_checkpoint: Path) -> Iterator[AppServer]:
    config = EngineConfig(
        model=str(tiny_checkpoint),
        max_total_tokens=1024,
        chunked_prefill_size=32,
        algorithm="low_confidence_static",
        debug_poison_pages=True,
        show_progress=False,
    )
    engine = GatedEngine(Engine(config))
    with AppServer(str(tiny_checkpoint), engine=engine) as server:
        yield server
        engine.open_gate()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def call(server: AppServer, stream: bool, count: int) -> socket.socket:
    """A connection on which a call has been sent."""
    params = {"max_new_tokens": 300, "ignore_eos": True}
    body = orjson.dumps({"input_ids": [PROMPT] * count, "stream": stream, "sampling_params": params})
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0))
    connection.sendall(head.encode() + body)
    return connection


# Steps before the client leaves: none (it waits for the engine's next step), in the prefill (three chunks), inside the
# first block, behind the first commit.
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_two_steps_later_all_is_free(gated: AppServer, stream: bool, steps: int, count: int) -> None:
    engine: GatedEngine = gated.engine
    parts, scheduler = engine.engine.parts, engine.engine.scheduler
    before = engine.steps
    connection = call(gated, stream, count)
    until(lambda: len(scheduler._live) == count)
    engine.allow(steps)
    until(lambda: engine.steps == before + steps)
    time.sleep(0.02)  # the engine waits in its next step
    assert (sum(lease.count for lease in parts.cache._leases) > 0) == (steps > 0)
    assert len(scheduler.running) == count or steps < 5
    connection.close()
    until(lambda: gated.manager.live == 0)
    until(lambda: gated.client._life is not None and gated.client._life._outbox.empty())
    time.sleep(0.05)
    engine.allow(2)
    until(lambda: engine.steps == before + steps + 2)
    until(lambda: not engine.has_work())
    until(lambda: set(leftovers(engine.engine).values()) == {0})
    assert gated.client._mailboxes == {}
