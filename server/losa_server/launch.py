"""Starts the engine process and the HTTP server, and ends both: by signal, or when engines are lost too often.

The order matters: the port is taken first (a clash shows before a model is loaded), the engine must be ready before the
first connection is accepted, and at the end the port stays open, for refusals, until accepted requests are answered;
the engine and the socket directory go last.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence

import uvicorn
from rich.console import Console

from losa_runtime.core.config import EngineConfig
from losa_runtime.tokenizer import Tokenizer
from losa_server.banner import show_ready, show_start
from losa_server.channel import remove_stale_directories
from losa_server.engine_client import EngineClient
from losa_server.engine_life import ENGINE_COMMAND, EngineLife
from losa_server.errors import EngineUnavailable, StartFailed
from losa_server.http.app import create_app
from losa_server.http.protocol import http_config
from losa_server.keys import Keyring
from losa_server.logs import set_up
from losa_server.request_manager import RequestManager
from losa_server.settings import ServerSettings
from losa_server.supervisor import Supervisor
from losa_server.tracing import Tracer

log = logging.getLogger("losa.server")

# How long the HTTP side stays after it has given up on engines, so that clients and probes are told why.
FAREWELL_S = 1.0
DRAIN_POLL_S = 0.02
LAST_BYTES_S = 0.5  # for answers to get out after a second signal


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours also end the engine, and the exit code stays ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_until_stopped(config: EngineConfig, settings: ServerSettings, command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until SIGINT or SIGTERM (0), or until engines are lost too often (1). command: of the engine process.

    Raises StartFailed."""
    set_up("server", settings.log_level, settings.log_format)
    listener = take_port(settings.host, settings.port)
    for path in remove_stale_directories():
        log.info("removed %s, which a server that was killed has left", path)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_Launch(config, settings, command, listener).run())
    finally:
        listener.close()


def take_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises StartFailed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio sets TCP_NODELAY on such sockets only, and without it an answer takes 40 ms more.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartFailed(f"port {port} on {host} is in use; choose another with --port") from None
        raise StartFailed(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener


class _Launch:
    """One run of the server."""

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, command: Sequence[str], listener: socket.socket
    ) -> None:
        self._config, self._settings, self._command, self._listener = config, settings, command, listener
        self._keys = Keyring.of(settings)
        self._tracer = None if settings.otlp_endpoint is None else Tracer(settings.otlp_endpoint)
        self._console = Console()
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._asked = False
        self._client = EngineClient()
        self._supervisor = Supervisor(self._client, self._start_engine, settings.max_restarts, self._gave_up)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask)
        self._supervisor.begin()
        try:
            if await self._load(self._client):
                self._supervisor.keep()
                await self._serve(self._client)
        finally:
            await self._supervisor.close()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)
        return 0 if self._asked else 1

    def _ask(self) -> None:
        """A signal: the first one asks for an orderly end, the next one for a quick one."""
        (self._at_once if self._asked else self._stop).set()
        self._asked = True

    def _start_engine(self, life: EngineLife) -> None:
        life.start(self._config, os.getpid(), self._settings, self._command)

    def _gave_up(self, _reason: str) -> None:
        asyncio.get_running_loop().call_later(FAREWELL_S, self._stop.set)

    async def _load(self, client: EngineClient) -> bool:
        """Wait for the engine; False when asked to stop meanwhile. Raises StartFailed."""
        started = time.monotonic()
        ready, stop = asyncio.create_task(client.wait_ready()), asyncio.create_task(self._stop.wait())
        # A line and no spinner: the engine process writes its log and its progress bar to the same terminal.
        self._console.print(f"loading {self._config.model}", highlight=False)
        await asyncio.wait((ready, stop), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            return False
        stop.cancel()
        try:
            show_start(self._console, ready.result(), time.monotonic() - started)
        except EngineUnavailable as error:
            raise StartFailed(error.message) from None
        return True

    async def _serve(self, client: EngineClient) -> None:
        tokenizer = Tokenizer(client.info["tokenizer_path"], client.info.get("mask_token_id"))
        app = create_app(RequestManager(client, tokenizer, self._settings), self._keys, self._tracer)
        server = _Server(http_config(app, self._settings))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        stop = asyncio.create_task(self._stop.wait())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            show_ready(self._console, self._url(), with_key=bool(self._keys))
            if not self._keys and not ipaddress.ip_address(self._listener.getsockname()[0]).is_loopback:
                log.warning("listening beyond this machine, without keys: whoever reaches the port can use the server")
        await asyncio.wait((serving, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        await self._drain(client)
        client.refuse("the server is shutting down")
        server.should_exit = True
        at_once = asyncio.create_task(self._at_once.wait())
        await asyncio.wait((serving, at_once), return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        if not serving.done():
            await asyncio.wait((serving,), timeout=LAST_BYTES_S)
            server.force_exit = True
        await serving

    async def _drain(self, client: EngineClient) -> None:
        """Refuse what comes, on an open port, until what was accepted is answered, time is over, or a second signal."""
        client.drain("the server is shutting down")
        self._supervisor.retire()
        deadline = time.monotonic() + self._settings.drain_timeout
        waiting = client.live
        if waiting:
            log.warning("stopping: %d requests go on for at most %g s", waiting, self._settings.drain_timeout)
        while client.live and time.monotonic() < deadline and not self._at_once.is_set():
            await asyncio.sleep(DRAIN_POLL_S)
        if client.live:
            log.warning("stopping with %d of them unfinished", client.live)

    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    loop: type[asyncio.AbstractEventLoop] = uvloop.Loop
    return loop
