"""Whatever arrives on the sockets between the processes: it is counted and dropped, and both sides go on."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import zmq

from losa_server.channel import MAX_MESSAGE_BYTES
from losa_server.messages import TO_ENGINE, TO_FRONTEND
from tests.server.app_server import AppServer
from tests.server.server_process import ServerProcess
from tests.server.test_leaving import until
from tests.server.test_messages import hostile_frames

GIANT = [b'{"kind":"abort","rid":"' + b"x" * (MAX_MESSAGE_BYTES + 1) + b'"}']


SOME_OR_MANY = pytest.mark.parametrize(
    "count",
    [pytest.param(500, id="some"), pytest.param(50_000, id="many", marks=[pytest.mark.slow, pytest.mark.soak])],
)


@pytest.fixture
def target(bundled: str) -> Iterator[AppServer]:
    with AppServer(bundled) as running:
        yield running


def is_well(server: AppServer) -> bool:
    body = {"text": "the fox", "sampling_params": {"max_new_tokens": 8}}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    return reply.status_code == 200 and reply.json()["meta_info"]["completion_tokens"] == 8


@SOME_OR_MANY
def test_frames_to_the_http_process(target: AppServer, tmp_path: Path, count: int, record: Callable[..., None]) -> None:
    frames = [*hostile_frames(str(tmp_path / "canary"), count), GIANT]
    # One of them is a message in this direction.
    frames = [parts for parts in frames if not parts[0].startswith(b'{"kind":"outputs"')]
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(target.directory.address(TO_FRONTEND))
        for parts in frames:
            socket.send_multipart(parts)
        assert until(lambda: target.client.malformed_messages == len(frames), 120)
    assert is_well(target)
    assert target.client.malformed_messages == len(frames)
    assert not (tmp_path / "canary").exists()
    record("hostile frames to the HTTP process", frames=len(frames), dropped=target.client.malformed_messages)


@SOME_OR_MANY
def test_frames_to_the_engine(target: AppServer, tmp_path: Path, count: int, record: Callable[..., None]) -> None:
    frames = [*hostile_frames(str(tmp_path / "canary"), count), GIANT]
    life = target.client._life
    assert life is not None

    async def send() -> None:
        for parts in frames:
            await life._sender._socket.send_multipart(parts)

    target.call(send(), 120)
    assert is_well(target)
    assert until(lambda: target.client.report.get("malformed_messages") == len(frames), 120)
    assert is_well(target)
    assert not (tmp_path / "canary").exists()
    record("hostile frames to the engine", frames=len(frames), dropped=target.client.report.get("malformed_messages"))


def test_sockets_are_for_their_owner_alone(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        (directory,) = server.socket_directories()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {path.name for path in directory.iterdir()} >= {TO_ENGINE.name, TO_FRONTEND.name}
        processes = [psutil.Process(server.process.pid), *server.children()]
        ports = {c.laddr.port for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert ports == {server.port}


def test_secrets_stay_with_the_server(tmp_path: Path, bundled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_API_KEY", "very-secret-key")
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer very-secret-key"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        for process in server.children():
            assert "very-secret-key" not in str(process.environ())
        assert "very-secret-key" not in " ".join(psutil.Process(server.process.pid).cmdline())
        assert server.stop() == 0
        assert "very-secret-key" not in server.output()
