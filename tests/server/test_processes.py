"""Two real processes: starting, failing to start, ending. Nothing is left behind and nobody waits for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.server.clients import Clients
from tests.server.server_process import PATIENCE_S, ROOT, ServerProcess, gone


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_orderly_end(tmp_path: Path, bundled: str, number: signal.Signals) -> None:
    with ServerProcess("--model", bundled, "--drain-timeout", "0.2", tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        (directory,) = server.socket_directories()
        assert directory.stat().st_mode & 0o777 == 0o700
        clients = Clients(server.url, 4)
        assert server.stop(number) == 0, server.output()
        endings = clients.join(30)
        assert all("shutting down" in ending.text for ending in endings)
        assert gone(engine, 10)
        assert server.socket_directories() == []
        assert "ready" in server.output()
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_http_process_is_killed(tmp_path: Path, bundled: str, stopped: bool) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        engine = server.engine
        if stopped:
            engine.suspend()
        server.process.kill()
        assert gone(engine, 30)
        deadline = time.monotonic() + 30
        while server.socket_directories() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.socket_directories() == []


@pytest.mark.slow
def test_what_two_killed_processes_have_left_goes_with_the_next_start(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        (directory,) = server.socket_directories()
        engine = server.engine
        engine.suspend()
        engine.kill()
        server.process.kill()
        server.process.wait()
        assert gone(engine, 30)
    os.utime(directory, (0, 0))
    young = tmp_path / "losa-young"
    strange = tmp_path / "losa-strange"
    young.mkdir()
    (young / "in-use").touch()
    strange.mkdir()
    os.utime(strange, (0, 0))
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        used = set(server.socket_directories()) - {young, strange}
        assert len(used) == 1 and directory not in used
        os.utime(used.pop(), (0, 0))  # old, but in use
        with ServerProcess("--model", bundled, tmp=tmp_path) as another:
            another.wait_ready()
            assert len(another.socket_directories()) == 4
            assert another.stop() == 0
        assert server.stop() == 0
    assert sorted(path.name for path in tmp_path.glob("losa-*")) == ["losa-strange", "losa-young"]


@pytest.mark.parametrize(
    ("method", "message"), [("broken", "sparse_method: found 'broken'"), ("raise", "RuntimeError: boom while loading")]
)
def test_an_engine_that_cannot_start(tmp_path: Path, bundled: str, method: str, message: str) -> None:
    with ServerProcess("--model", bundled, "--sparse-method", method, tmp=tmp_path) as server:
        assert server.process.wait(PATIENCE_S) == 1
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
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 1
        assert (
            done.stderr.strip() == f"losa serve: error: port {port} on 127.0.0.1 is in use; choose another with --port"
        )


def test_stopped_while_loading(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        engine = server.first_engine()
        assert server.stop(signal.SIGINT) == 0, server.output()
        assert gone(engine, 10)
        assert server.socket_directories() == []


@pytest.mark.slow
def test_loading_may_be_silent_for_longer_than_a_heartbeat(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--heartbeat-timeout", "0.5", tmp=tmp_path) as server:
        engine = server.first_engine()
        engine.suspend()
        time.sleep(2.0)
        assert server.process.poll() is None, server.output()
        engine.resume()
        server.wait_ready()
        assert server.engine == engine
        assert server.stop() == 0


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
