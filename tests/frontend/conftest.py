"""One real server with the bundled model for all programs of this folder.

FRONTEND_SERVER_URL names a running one instead (`matrix.py` does so for every release of the frontend); nothing of this
runtime is then imported, and only pytest and sglang have to be installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "tiny_model" / "checkpoint"
# A fixed number of steps, so that blocks have later steps, in which the sparse method reads less.
SERVER_OPTIONS = (
    *("--max-total-tokens", "65536", "--sparse-method", "losa", "--token-budget", "256"),
    *("--algorithm", "low_confidence_static", "--denoising-steps", "8", "--log-level", "warning"),
)


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the server is."""
    running = os.environ.get("FRONTEND_SERVER_URL")
    if running:
        yield running
        return
    from tests.server.server_process import ServerProcess

    options = ("--model", str(CHECKPOINT), *SERVER_OPTIONS)
    with ServerProcess(*options, fake=False, tmp=tmp_path_factory.mktemp("frontend")) as server:
        server.wait_ready()
        yield server.url
        assert server.stop() == 0, server.output()


@pytest.fixture(autouse=True)
def endpoint(url: str) -> Iterator[Any]:
    """The default backend of every program, with the chat template that the model was trained with."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name="chatml")
    sgl.set_default_backend(backend)
    yield backend
    sgl.set_default_backend(None)
