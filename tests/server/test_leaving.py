"""Requests that end early: aborted, left by their client, or failing beside others. Nothing stays behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.app_server import AppServer


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_flush_is_refused_while_requests_are_pending(http: httpx.Client, server: AppServer) -> None:
    worker = threading.Thread(
        target=lambda: httpx.post(f"{server.url}/generate", json={"text": "HANG", "rid": "flush"})
    )
    worker.start()
    assert until(lambda: server.engine.live != {})
    reply = http.post("/flush_cache")
    assert (reply.status_code, "pending" in reply.json()["error"]["message"]) == (400, True)
    threading.Timer(0.2, lambda: http.post("/abort_request", json={"rid": "flush"})).start()
    assert http.post("/flush_cache?timeout=5").status_code == 200
    worker.join()


def test_abort_by_prefix_answers_the_waiting_client(http: httpx.Client, server: AppServer) -> None:
    replies: list[httpx.Response] = []
    body = {"text": "HANG", "rid": "job-17"}
    worker = threading.Thread(target=lambda: replies.append(httpx.post(f"{server.url}/generate", json=body)))
    worker.start()
    assert until(lambda: server.engine.live != {})
    assert http.post("/abort_request", json={"rid": "other"}).json() == {"aborted": 0}
    assert http.post("/abort_request", json={}).json() == {"aborted": 0}
    assert http.post("/abort_request", json={"rid": 5}).status_code == 400
    assert http.post("/abort_request", json={"rid": "job"}).json() == {"aborted": 1}
    worker.join(5)
    meta = replies[0].json()["meta_info"]
    assert (replies[0].status_code, meta["id"], meta["finish_reason"]["type"]) == (200, "job-17", "abort")


@pytest.mark.parametrize("text", ["HANG", "SLOW fox"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_leaves_is_aborted(server: AppServer, text: str, stream: bool, count: int) -> None:
    before = server.engine.aborted
    body = {"text": [text] * count, "stream": stream, "sampling_params": {"max_new_tokens": 2000}}
    with httpx.Client(base_url=server.url, timeout=httpx.Timeout(5, read=0.3)) as leaving:
        if stream and text != "HANG":
            with leaving.stream("POST", "/generate", json=body) as reply:
                next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/generate", json=body)
    assert until(lambda: server.engine.aborted == before + count, 1.0)
    assert server.engine.live == {}
    assert server.manager.live == 0


def test_a_client_that_leaves_while_the_server_drains_is_aborted(bundled: str) -> None:
    """The engine must not go on for nobody while others wait for their last tokens."""
    with AppServer(bundled) as draining:
        body = {"text": "HANG", "sampling_params": {"max_new_tokens": 2000}}

        def drain() -> None:
            assert until(lambda: draining.engine.live != {})
            draining.client.drain("the server is shutting down")

        watch = threading.Thread(target=drain)
        with httpx.Client(base_url=draining.url, timeout=httpx.Timeout(5, read=2.0)) as leaving:
            watch.start()
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/generate", json=body)
        watch.join()
        assert not draining.client.healthy
        assert until(lambda: draining.engine.aborted == 1 and draining.engine.live == {})


def test_clients_that_leave_leave_nothing_behind(server: AppServer) -> None:
    async def tasks() -> int:
        return len(asyncio.all_tasks())

    def leave(i: int) -> None:
        body = {"text": ["HANG"] * (1 + i % 2), "stream": i % 3 != 0}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/generate", json=body, timeout=httpx.Timeout(5, read=0.02 + i % 5 * 0.03))

    before = server.call(tasks())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(60)))
    assert until(lambda: server.engine.live == {}, 3.0)
    assert server.manager.live == 0
    assert server.client._mailboxes == {}
    assert until(lambda: server.call(tasks()) <= before + 2, 3.0)


def test_a_failed_prompt_aborts_its_siblings(http: httpx.Client, server: AppServer) -> None:
    before = server.engine.aborted
    assert http.post("/generate", json={"text": ["HANG", "HANG", "REFUSE"]}).status_code == 500
    assert until(lambda: server.engine.aborted == before + 2)
    assert until(lambda: server.manager.live == 0)
