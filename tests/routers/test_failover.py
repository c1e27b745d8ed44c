"""A server of a fleet is killed, drained, taken away, brought back: those who come meanwhile get their answers."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter

import httpx
import pytest

from tests.routers.fleet import Fleet, call, live
from tests.server.server_process import PATIENCE_S

pytestmark = pytest.mark.slow
CALLS = 40


def prompts() -> list[str]:
    """Of four documents, so that routing by prefix has its favourites."""
    return [f"{i % 4} " + "The secret code of the red fox is 1234. " * 4 + f" {i}" for i in range(CALLS)]


def statuses(fleet: Fleet) -> Counter[int]:
    return Counter(fleet.generate(prompt).status_code for prompt in prompts())


def open_stream(fleet: Fleet) -> tuple[int, threading.Thread, list[str]]:
    """A stream through the router; (number of the server that it came to, its reader, what it has read)."""
    read: list[str] = []
    begun = threading.Event()

    def follow() -> None:
        try:
            with fleet.http.stream("POST", f"{fleet.url}/generate", json=call("the fox", 400, stream=True)) as reply:
                for piece in reply.iter_lines():
                    read.append(piece)
                    begun.set()
        except httpx.TransportError as error:
            read.append(f"broken: {error!r}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    assert begun.wait(PATIENCE_S)
    [number] = [number for number, server in enumerate(fleet.servers) if live(server)]
    return number, thread, read


def test_a_killed_server_is_left_out_and_taken_back(fleet: Fleet) -> None:
    assert statuses(fleet) == {200: CALLS}
    server = fleet.servers[0]
    for child in server.children():
        child.kill()
    server.process.kill()
    server.process.wait()
    got = statuses(fleet)
    assert got[200] >= CALLS - (0 if fleet.router.package == "smg" else 3), got
    assert set(got) <= {200, 500, 503}
    fleet.wait_healthy(1)
    assert statuses(fleet) == {200: CALLS}
    fleet.again(0)
    time.sleep(6)  # for the breaker of the older router
    assert statuses(fleet) == {200: CALLS}


def test_an_engine_that_is_killed_is_not_seen_by_those_who_come(fleet: Fleet) -> None:
    """The server itself stays and refuses with 503 and Retry-After, which routers try elsewhere."""
    engine = fleet.servers[1].engine
    engine.kill()
    assert statuses(fleet) == {200: CALLS}
    fleet.servers[1].new_engine(engine)
    fleet.wait_healthy(2)


def test_a_server_that_drains_ends_its_streams_and_gets_no_more(fleet: Fleet) -> None:
    time.sleep(6)  # for the breaker of the older router
    number, thread, read = open_stream(fleet)
    fleet.servers[number].process.send_signal(signal.SIGTERM)
    fleet.servers[number].wait_refusing()
    got = statuses(fleet)
    assert got[200] >= CALLS - (0 if fleet.router.package == "smg" else 3) and set(got) <= {200, 503}, got
    thread.join(PATIENCE_S)
    assert "data: [DONE]" in read[-2:], read[-3:]
    assert fleet.servers[number].process.wait(PATIENCE_S) == 0
    fleet.again(number)


def test_servers_come_and_go_by_request(fleet: Fleet) -> None:
    url = fleet.servers[1].url
    [worker] = [worker for worker in fleet.workers() if worker["url"] == url]
    assert fleet.http.delete(f"{fleet.url}/workers/{worker['id']}").status_code in (200, 202)
    deadline = time.monotonic() + PATIENCE_S
    while len(fleet.workers()) != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [worker["url"] for worker in fleet.workers()] == [fleet.servers[0].url]
    assert statuses(fleet) == {200: CALLS}
    assert fleet.http.post(f"{fleet.url}/workers", json={"url": url}).status_code in (200, 202)
    fleet.wait_healthy(2)
    assert statuses(fleet) == {200: CALLS}
