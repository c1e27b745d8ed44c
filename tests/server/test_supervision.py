"""Engines that die, hang or fail, in real processes: whoever waits is told, and another engine takes over.

With the echo engine, since only its process matters here; the drills do the same with the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.drills.clients import Ending
from tests.server.clients import Clients
from tests.server.server_process import PATIENCE_S, ServerProcess, gone


def status(server: ServerProcess, path: str = "/health") -> tuple[int, str]:
    reply = httpx.get(server.url + path, timeout=PATIENCE_S)
    return reply.status_code, reply.text


def ask(server: ServerProcess, text: str = "the fox") -> httpx.Response:
    body = {"text": text, "sampling_params": {"max_new_tokens": 4}}
    return httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE_S)


def all_told(endings: list[Ending], *words: str) -> None:
    """Everybody was told once that the engine is gone: streams in their last event, others by the status."""
    assert {ending.status for ending in endings} == {200, 503}
    for ending in endings:
        assert ending.failed and ending.proper, ending
        assert all(word in ending.text for word in words), ending


def unhealthy(server: ServerProcess, seconds: float = PATIENCE_S) -> str:
    """What /health says when it first says 503."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        code, text = status(server)
        if code == 503:
            return text
        time.sleep(0.02)
    raise AssertionError(server.output())


def replaced(server: ServerProcess, engine: psutil.Process) -> psutil.Process:
    """The next engine, after it has answered; nothing of the one before is left."""
    other = server.new_engine(engine)
    assert gone(engine, 30)
    assert ask(server).json()["text"].startswith("the fox")
    assert len(server.socket_directories()) == 1
    return other


def test_a_killed_engine_is_replaced(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        clients = Clients(server.url, 8)
        engine.kill()
        assert "signal 9" in unhealthy(server)
        reply = ask(server)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        all_told(clients.join(PATIENCE_S), "the engine is gone", "signal 9")
        replaced(server, engine)
        state = httpx.get(f"{server.url}/server_info").json()["internal_states"][0]
        assert state["live_requests"] == 0
        assert server.stop() == 0


def freeze(engine: psutil.Process, server: ServerProcess) -> None:
    engine.suspend()


def stick(engine: psutil.Process, server: ServerProcess) -> None:
    Clients(server.url, 2, text="STICK", started=False)


def turn_in_circles(engine: psutil.Process, server: ServerProcess) -> None:
    Clients(server.url, 2, text="HANG", started=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hurt", "reason"),
    [(freeze, "silent"), (stick, "without finishing a forward"), (turn_in_circles, "without finishing a forward")],
)
def test_an_engine_that_hangs_is_replaced(
    tmp_path: Path, bundled: str, hurt: Callable[[psutil.Process, ServerProcess], None], reason: str
) -> None:
    options = ("--heartbeat-timeout", "1.5", "--watchdog-timeout", "1.5")
    with ServerProcess("--model", bundled, *options, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        clients = Clients(server.url, 4) if hurt is freeze else None
        hurt(engine, server)
        assert reason in unhealthy(server)
        if clients is not None:
            all_told(clients.join(PATIENCE_S), "the engine is gone", reason)
        replaced(server, engine)
        assert hurt is freeze or "most recent call first" in server.output(), "where it hung is in the log"
        assert server.stop() == 0


@pytest.mark.slow
def test_a_slow_engine_is_left_alone(tmp_path: Path, bundled: str) -> None:
    """Each forward takes longer than the time in which a heartbeat must come, and the work longer than the watchdog."""
    options = ("--heartbeat-timeout", "0.5", "--watchdog-timeout", "1.5")
    with ServerProcess("--model", bundled, *options, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        clients = Clients(server.url, 16, tokens=12)
        assert not any(ending.failed for ending in clients.join(PATIENCE_S))
        assert server.engine == engine
        assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("word", "told"), [("RAISE", "boom in a step"), ("EXIT", "exit code 9")])
def test_an_engine_that_fails_is_replaced(tmp_path: Path, bundled: str, word: str, told: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        clients = Clients(server.url, 2)
        reply = ask(server, word)
        assert reply.status_code == 503 and told in reply.json()["error"]["message"]
        all_told(clients.join(PATIENCE_S), told)
        replaced(server, engine)
        assert server.stop() == 0


@pytest.mark.slow
def test_too_many_restarts_end_the_server(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--max-restarts", "2", tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        for _ in range(2):
            engine.kill()
            engine = replaced(server, engine)
        engine.kill()
        assert server.process.wait(PATIENCE_S) == 1
        assert "giving up" in server.output()
        assert server.socket_directories() == []


@pytest.mark.slow
def test_stopping_while_an_engine_is_being_replaced(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        server.engine.kill()
        unhealthy(server)
        assert server.stop() == 0
        assert server.children() == [] and server.socket_directories() == []
