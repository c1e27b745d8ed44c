"""A server of this package as a subprocess: started on a free port, waited for, and always ended again.

For demonstrations and measurements over HTTP. Knows the command line and the health route, nothing of what is asked.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from losa_runtime.core.errors import LosaError

LOG_LINES = 15


class ServerFailed(LosaError):
    """The server ended or did not become ready; the message holds the end of its log."""


class RunningServer:
    """`losa serve --model MODEL OPTIONS` between entry and exit; entry raises ServerFailed. url: where it listens.

    environ: the server's environment, None = that of this process. ready_s: seconds that it may take to load.
    """

    def __init__(
        self,
        model: str,
        options: Sequence[str] = (),
        ready_s: float = 120.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._environ = environ
        self._ready_s = ready_s
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        head = [sys.executable, "-P", "-m", "losa_server", "serve", "--model", model, "--port", str(self.port)]
        self.command = [*head, *options]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object; read after the server's end)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environ,
        )
        try:
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end()

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300.0) -> Any:
        """The JSON answer to a JSON body. Raises ServerFailed with the server's reason."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return self._answer(request, timeout_s)

    def get(self, path: str, timeout_s: float = 30.0) -> Any:
        """The JSON answer. Raises ServerFailed with the server's reason."""
        return self._answer(urllib.request.Request(self.url + path), timeout_s)

    def log_tail(self) -> str:
        """The last lines that the server has printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])

    def _answer(self, request: urllib.request.Request, timeout_s: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise ServerFailed(f"{request.full_url}: {error.code}: {error.read().decode()}") from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ServerFailed(f"{request.full_url}: {error}\n{self.log_tail()}") from None

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._ready_s
        while time.monotonic() < deadline:
            code = self.process.poll()
            if code is not None:
                raise ServerFailed(f"the server ended with exit code {code}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise ServerFailed(f"the server was not ready within {self._ready_s:g} s:\n{self.log_tail()}")

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
