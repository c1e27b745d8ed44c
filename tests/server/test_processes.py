"""Two real processes: starting, failing to start, dying, ending. Nothing is left behind and nobody waits for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.server_process import ROOT, ServerProcess


def gone(process: psutil.Process, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


class Clients:
    """Clients, every second one streaming, that wait for an answer which takes very long. endings: what they get."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.endings, self._started = url, list[str](), threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, args=(i % 2 == 0,)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in range(count // 2):
            assert self._started.acquire(timeout=20)

    def join(self, seconds: float) -> list[str]:
        for thread in self._threads:
            thread.join(seconds)
        return self.endings

    def _run(self, stream: bool) -> None:
        body = {"text": "SLOW fox", "stream": stream, "sampling_params": {"max_new_tokens": 4000}}
        with httpx.stream("POST", f"{self.url}/generate", json=body, timeout=20) as reply:
            text = ""
            for piece in reply.iter_text():
                if not text and stream:
                    self._started.release()
                text += piece
            self.endings.append(f"{reply.status_code} {text}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_orderly_end(tmp_path: Path, bundled: str, number: signal.Signals) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        (directory,) = server.socket_directories()
        assert directory.stat().st_mode & 0o777 == 0o700
        clients = Clients(server.url, 4)
        started = time.monotonic()
        assert server.stop(number) == 0, server.output()
        assert time.monotonic() - started < 5
        endings = clients.join(5)
        assert len(endings) == 4
        assert all("shutting down" in ending for ending in endings)
        assert gone(engine, 1)
        assert server.socket_directories() == []
        assert "ready" in server.output()
        assert "Traceback" not in server.output()


def test_the_engine_is_killed(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 8)
        started = time.monotonic()
        server.engine.kill()
        endings = clients.join(5)
        assert time.monotonic() - started < 2
        assert len(endings) == 8
        assert all("the engine is gone" in ending and "signal 9" in ending for ending in endings), endings
        assert {ending[:3] for ending in endings} == {"200", "503"}
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.post(f"{server.url}/generate", json={"text": "the fox"}).status_code == 503
        assert server.process.wait(10) == 1
        assert server.socket_directories() == []


@pytest.mark.parametrize(("word", "status"), [("RAISE", 500), ("EXIT", 503)])
def test_the_engine_fails_in_a_step(tmp_path: Path, bundled: str, word: str, status: int) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        clients = Clients(server.url, 2)
        reply = httpx.post(f"{server.url}/generate", json={"text": word})
        assert reply.status_code == status
        if word == "RAISE":
            assert "boom in a step" in reply.json()["error"]["message"]
        endings = clients.join(5)
        assert len(endings) == 2
        assert all('"error"' in ending for ending in endings)
        assert server.process.wait(10) == 1


def test_the_http_process_is_killed(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        server.process.kill()
        assert gone(engine, 2)
        deadline = time.monotonic() + 2
        while server.socket_directories() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.socket_directories() == []


@pytest.mark.parametrize(
    ("method", "message"), [("broken", "sparse_method: found 'broken'"), ("raise", "RuntimeError: boom while loading")]
)
def test_an_engine_that_cannot_start(tmp_path: Path, bundled: str, method: str, message: str) -> None:
    with ServerProcess("--model", bundled, "--sparse-method", method, tmp=tmp_path) as server:
        assert server.process.wait(20) == 1
        assert f"losa serve: error: {message}" in server.output()
        assert server.socket_directories() == []
        if method == "broken":
            assert "Traceback" not in server.output()


def test_a_port_in_use(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server.process.kill()
        command = [*server.command[:-3], str(port), "--model", bundled]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert (
            done.stderr.strip() == f"losa serve: error: port {port} on 127.0.0.1 is in use; choose another with --port"
        )


def test_stopped_while_loading(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        deadline = time.monotonic() + 10
        while not server.children() and time.monotonic() < deadline:
            time.sleep(0.002)
        engine = server.engine
        assert server.stop(signal.SIGINT) == 0, server.output()
        assert gone(engine, 1)
        assert server.socket_directories() == []


def test_the_process_tree_listens_on_one_port(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        tree = [psutil.Process(server.process.pid), *server.children()]
        listening = [c.laddr for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert [tuple(address) for address in listening] == [("127.0.0.1", server.port)]
        assert server.stop() == 0


def test_an_engine_process_without_settings_says_so() -> None:
    command = [sys.executable, "-m", "losa_server.engine_process"]
    done = subprocess.run(command, input=json.dumps({"x": 1}), capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert "started by the server" in done.stderr
    assert "Traceback" not in done.stderr
