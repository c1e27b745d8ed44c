"""A full queue: whoever comes is refused by the HTTP process itself, however long the engine's step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from losa_runtime.core.config import EngineConfig
from tests.server.app_server import AppServer
from tests.server.clients import Clients
from tests.server.fake_engine import FakeEngine
from tests.server.gated_engine import GatedEngine

LIMIT = 4


@pytest.fixture
def full(bundled: str) -> Iterator[tuple[AppServer, GatedEngine, Clients]]:
    """A server whose engine stands in a step, with as many requests waiting as may."""
    engine = GatedEngine(FakeEngine(EngineConfig(model=bundled, max_queued_requests=LIMIT)))
    with AppServer(bundled, engine=engine) as server:
        clients = Clients(server.url, LIMIT, text="the fox", tokens=8, started=False)
        deadline = time.monotonic() + 20
        while server.client.live < LIMIT and time.monotonic() < deadline:
            time.sleep(0.01)
        yield server, engine, clients
        engine.open_gate()


def ask(server: AppServer, count: int = 1, **more: object) -> httpx.Response:
    body = {"text": ["the fox"] * count, "sampling_params": {"max_new_tokens": 4}, **more}
    return httpx.post(f"{server.url}/generate", json=body, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_refused_without_asking_the_engine(full: tuple[AppServer, GatedEngine, Clients], stream: bool) -> None:
    server, engine, clients = full
    for _ in range(20):
        reply = ask(server, stream=stream)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert f"{LIMIT} requests are waiting" in reply.json()["error"]["message"]
    assert engine.steps == 0 and engine.added <= LIMIT, "the engine stood still and was not asked"
    assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200, "busy is not unhealthy"
    engine.open_gate()
    assert [ending.status for ending in clients.join(20)] == [200] * LIMIT
    deadline = time.monotonic() + 20
    while ask(server).status_code != 200:
        assert time.monotonic() < deadline, "there is room again"


def test_a_call_that_can_never_fit_is_told_so(full: tuple[AppServer, GatedEngine, Clients]) -> None:
    server, _, _ = full
    reply = ask(server, LIMIT + 1)
    assert reply.status_code == 400 and f"at most {LIMIT}" in reply.json()["error"]["message"]


def test_the_engine_has_the_last_word(bundled: str) -> None:
    """Should the HTTP process think that there is room, the engine still refuses, and says the same."""
    engine = GatedEngine(FakeEngine(EngineConfig(model=bundled, max_queued_requests=LIMIT)))
    with AppServer(bundled, engine=engine) as server:
        server.client.queue.limit = None
        clients = Clients(server.url, LIMIT + 3, text="the fox", tokens=4000, started=False)
        deadline = time.monotonic() + 20
        while len(clients.endings) < 3 and time.monotonic() < deadline:
            engine.allow(1)
            time.sleep(0.02)
        assert [ending.status for ending in clients.endings] == [503] * 3
        assert all("the queue is full" in ending.text for ending in clients.endings)
        engine.open_gate()
        statuses = [ending.status for ending in clients.join(40)]
        assert statuses == [503] * 3 + [200] * LIMIT
