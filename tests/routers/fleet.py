"""Two servers with the bundled model and a router before them."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.routers.recipes import Router
from tests.server.server_process import PATIENCE_S, ROOT, ServerProcess, free_port

CHECKPOINT = str(ROOT / "benchmarks" / "tiny_model" / "checkpoint")
MODEL = "tiny"
SERVER_OPTIONS = ("--model", CHECKPOINT, "--served-model-name", MODEL, "--max-total-tokens", "16384")


class Fleet:
    """Between entry and exit two servers and the router run; entry waits until it has both."""

    def __init__(self, router: Router, tmp: Path) -> None:
        self.router, self.tmp, self._stack = router, tmp, ExitStack()
        self.http = httpx.Client(timeout=PATIENCE_S)
        self.servers: list[ServerProcess] = []
        self.port, self._log = free_port(), tmp / "router.log"
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.servers = [stack.enter_context(self._server(i)) for i in range(2)]
            for server in self.servers:
                server.wait_ready()
            command = self.router.command(self.port, free_port(), [server.url for server in self.servers])
            environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            log = stack.enter_context(self._log.open("wb"))
            self.process = subprocess.Popen(command, cwd=self.tmp, env=environ, stdout=log, stderr=log)
            stack.callback(self._end)
            self.wait_healthy(2)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()
        for server in self.servers:
            server.__exit__()
        self.http.close()

    def workers(self) -> list[dict[str, Any]]:
        """What the router says of its servers; nothing while it does not answer."""
        try:
            reply = self.http.get(f"{self.url}/workers")
        except httpx.TransportError:
            return []
        return list(reply.json()["workers"]) if reply.status_code == 200 else []

    def wait_healthy(self, count: int) -> None:
        """Until the router takes so many servers for healthy."""
        deadline = time.monotonic() + PATIENCE_S
        while sum(worker["is_healthy"] for worker in self.workers()) != count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def generate(self, text: str, tokens: int = 8, **more: Any) -> httpx.Response:
        """A greedy call through the router."""
        return self.http.post(f"{self.url}/generate", json=call(text, tokens, **more))

    def again(self, number: int) -> None:
        """Start another server in the place of one that has ended, and wait until the router has it."""
        self.servers[number].__exit__()
        self.servers[number] = self._server(number, self.servers[number].port)
        self.servers[number].__enter__()
        self.servers[number].wait_ready()
        self.wait_healthy(2)

    def log(self) -> str:
        """The end of what the router has printed."""
        return self._log.read_text(errors="replace")[-3000:]

    def _server(self, number: int, port: int | None = None) -> ServerProcess:
        folder = self.tmp / f"server-{number}"
        folder.mkdir(exist_ok=True)
        return ServerProcess(*SERVER_OPTIONS, fake=False, tmp=folder, port=port)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()


def call(text: str, tokens: int, **more: Any) -> dict[str, Any]:
    """Body of a greedy call of /generate."""
    custom = more.pop("custom_params", None)
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": custom}
    return {"text": text, "sampling_params": params, **more}


def live(server: ServerProcess) -> int:
    """Requests that a server has accepted and not answered."""
    state = httpx.get(f"{server.url}/server_info", timeout=PATIENCE_S).json()["internal_states"][0]
    return int(state["live_requests"])
