"""A whole server inside the test process: real HTTP, real zmq sockets, an engine in a thread (else the echo)."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType
from typing import Any, Self

import uvicorn

from losa_runtime.core.config import EngineConfig
from losa_runtime.tokenizer import Tokenizer
from losa_server.channel import Receiver, Sender
from losa_server.engine_client import EngineClient
from losa_server.engine_loop import EngineLoop
from losa_server.http.app import create_app
from losa_server.http.protocol import http_config
from losa_server.launch import take_port
from losa_server.messages import TO_ENGINE, TO_FRONTEND, EngineReady
from losa_server.request_manager import RequestManager
from losa_server.settings import ServerSettings
from losa_server.tracing import Tracer
from tests.server.fake_engine import FakeEngine


class AppServer:
    """Started on entry, stopped on exit. `call` runs a coroutine in the server's event loop.

    send_buffer: bytes that the kernel holds of an answer that nobody reads; None leaves it to the kernel. engine: an
    EngineFace; None makes an echo.
    """

    def __init__(
        self,
        model: str,
        send_buffer: int | None = None,
        tracer: Tracer | None = None,
        engine: Any = None,
        **settings: Any,
    ) -> None:
        self.send_buffer, self.tracer = send_buffer, tracer
        self.settings = ServerSettings(port=0, **{"shutdown_s": 1.0, **settings})
        self.engine = engine or FakeEngine(EngineConfig(model=model, max_queued_requests=600))
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def call(self, coroutine: Any, seconds: float = 10) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    async def _main(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.client = EngineClient()
        self.directory = directory = self.client.connect()
        sender = Sender(directory.address(TO_FRONTEND))
        receiver = Receiver(directory.address(TO_ENGINE), TO_ENGINE)
        engine_loop = EngineLoop(self.engine, receiver, sender)

        def run_engine() -> None:
            sender.send(EngineReady(info=self.engine.info()))
            engine_loop.run()
            receiver.close()
            sender.close()

        thread = threading.Thread(target=run_engine, daemon=True)
        thread.start()
        await self.client.wait_ready()
        info = self.client.info
        tokenizer = Tokenizer(info["tokenizer_path"], info["mask_token_id"])
        self.manager = RequestManager(self.client, tokenizer, self.settings)
        listener = take_port("127.0.0.1", 0)
        if self.send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(http_config(create_app(self.manager, tracer=self.tracer), self.settings))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        self._up.set()
        await self._stop.wait()
        self.client.refuse("the server is shutting down")
        server.should_exit = True
        await serving
        engine_loop.stop()
        await asyncio.to_thread(thread.join, 5)
        await self.client.close()
