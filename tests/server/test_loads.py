"""The figures that routers read."""

from __future__ import annotations

import threading
import time

import httpx

from tests.server.app_server import AppServer


def test_what_routers_read(http: httpx.Client, server: AppServer) -> None:
    worker = threading.Thread(target=lambda: http.post("/generate", json={"text": "HANG", "rid": "busy"}))
    worker.start()
    deadline = time.monotonic() + 20
    while server.client.report.get("running") != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    answer = http.get("/v1/loads?include=core,disagg,queues,memory").json()
    assert answer["version"] and answer["timestamp"]
    [load] = answer["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["max_total_num_tokens"]) == (1, 0, 65536)
    assert load["num_used_tokens"] == (4096 - 4000 - 64) * 16
    assert load["token_usage"] == (4096 - 4000 - 64) / 4096
    assert all(type(load[name]) in (int, float) for name in load)
    [short] = http.get("/get_load").json()
    assert short == {"dp_rank": 0, "num_reqs": 1, "num_waiting_reqs": 0, "num_tokens": load["num_total_tokens"]}
    http.post("/abort_request", json={"rid": "busy"})
    worker.join()
