"""SIGTERM with work in progress: accepted requests are answered, others refused on an open port, all within a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.clients import Clients
from tests.server.server_process import ServerProcess


def refusals(server: ServerProcess) -> Iterator[httpx.Response]:
    """Answers of a draining server, as long as its port is open."""
    while True:
        try:
            yield httpx.get(f"{server.url}/health", timeout=20)
            yield httpx.get(f"{server.url}/ready", timeout=20)
            yield httpx.post(f"{server.url}/generate", json={"text": "the fox"}, timeout=20)
        except httpx.TransportError:
            return


def test_accepted_requests_are_answered(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 6, tokens=32)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        replies = list(refusals(server))
        endings = clients.join(30)
        assert [ending.status for ending in endings] == [200] * 6
        assert not any(ending.failed for ending in endings)
        assert server.process.wait(20) == 0, server.output()
    assert len(replies) >= 3, "the port stayed open"
    for reply in replies:
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert "shutting down" in reply.json()["error"]["message"]


@pytest.mark.slow
def test_it_does_not_wait_for_ever(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "0.5", tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 4)
        assert server.stop() == 0
        assert all(ending.failed and "shutting down" in ending.text for ending in clients.join(5))
        assert "4 of them unfinished" in server.output()


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, bundled: str, second: signal.Signals) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "600", tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 4)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        assert server.stop(second) == 0
        assert all(ending.failed for ending in clients.join(5))
        assert server.children() == [] and server.socket_directories() == []


def test_clients_that_leave_while_it_drains_are_not_waited_for(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "600", tmp=tmp_path) as server:
        server.wait_ready()
        body = {"text": "SLOW fox", "stream": True, "sampling_params": {"max_new_tokens": 4000}}
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=20) as reply:
            next(reply.iter_lines())
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
        assert server.process.wait(20) == 0


@pytest.mark.slow
def test_an_engine_that_dies_while_it_drains_is_not_replaced(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "600", tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 4)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.engine.kill()
        assert server.process.wait(20) == 0
        assert all(ending.failed and "signal 9" in ending.text for ending in clients.join(5))
        assert "another engine" not in server.output()
