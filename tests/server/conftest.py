"""Servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.app_server import AppServer

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "benchmarks" / "tiny_model" / "checkpoint"


@pytest.fixture(scope="session")
def bundled() -> str:
    """The bundled checkpoint folder; the echo engine needs its tokenizer only."""
    return str(BUNDLED)


@pytest.fixture(scope="module")
def server(bundled: str) -> Iterator[AppServer]:
    """A server over the echo engine, shared by the tests of a module."""
    with AppServer(bundled, max_body_bytes=2**20, max_prompt_chars=2**20) as running:
        yield running


@pytest.fixture
def http(server: AppServer) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client
