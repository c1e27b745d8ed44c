"""SIGTERM with work in progress: accepted requests are answered, others refused on an open port, all within a time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.clients import Clients
from tests.server.server_process import PATIENCE_S, ServerProcess


def refusals(server: ServerProcess) -> Iterator[httpx.Response]:
    """Answers of a draining server, as long as its port is open."""
    while True:
        try:
            yield httpx.get(f"{server.url}/health", timeout=PATIENCE_S)
            yield httpx.get(f"{server.url}/ready", timeout=PATIENCE_S)
            yield httpx.post(f"{server.url}/generate", json={"text": "the fox"}, timeout=PATIENCE_S)
        except httpx.TransportError:
            return


def test_accepted_requests_are_answered(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 6, tokens=64)
        server.wait_live(6)
        server.process.send_signal(signal.SIGTERM)
        server.wait_refusing()
        replies = list(refusals(server))
        endings = clients.join(PATIENCE_S)
        assert [ending.status for ending in endings] == [200] * 6
        assert not any(ending.failed for ending in endings)
        assert server.process.wait(PATIENCE_S) == 0, server.output()
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
        assert all(ending.failed and "shutting down" in ending.text for ending in clients.join(30))
        assert "4 of them unfinished" in server.output()


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, bundled: str, second: signal.Signals) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "600", tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 4)
        server.process.send_signal(signal.SIGTERM)
        server.wait_refusing()
        assert server.process.poll() is None
        assert server.stop(second) == 0
        assert all(ending.failed for ending in clients.join(30))
        assert server.children() == [] and server.socket_directories() == []


def test_clients_that_leave_while_it_drains_are_not_waited_for(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "600", tmp=tmp_path) as server:
        server.wait_ready()
        params = {"max_new_tokens": 4000, "ignore_eos": True}
        body = {"text": "SLOW fox", "stream": True, "sampling_params": params}
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=PATIENCE_S) as reply:
            lines = reply.iter_lines()  # kept: without it the connection would close at once
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_refusing()
            assert server.process.poll() is None
        assert server.process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_an_engine_that_dies_while_it_drains_is_not_replaced(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "600", tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 4)
        server.process.send_signal(signal.SIGTERM)
        server.wait_refusing()
        server.engine.kill()
        assert server.process.wait(PATIENCE_S) == 0
        assert all(ending.failed and "signal 9" in ending.text for ending in clients.join(30))
        assert "another engine" not in server.output()
