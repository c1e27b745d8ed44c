"""The supervisor over processes that are no engines: they end, say nothing, or do not exist."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import pytest

from losa_runtime.core.config import EngineConfig
from losa_server import vigil
from losa_server.engine_client import EngineClient
from losa_server.engine_life import EngineLife
from losa_server.errors import EngineUnavailable
from losa_server.settings import ServerSettings
from losa_server.supervisor import Supervisor

ENDS = (sys.executable, "-S", "-c", "raise SystemExit(3)")
SLEEPS = (sys.executable, "-S", "-c", "import time; time.sleep(1000)")


class Stage:
    """A supervisor of processes with this command. starts: how many there were; given_up: why."""

    def __init__(self, command: Sequence[str], max_restarts: int = 2, **settings: float) -> None:
        self.command, self.settings = command, ServerSettings(**settings)  # type: ignore[arg-type]
        self.client = EngineClient()
        self.lives: list[EngineLife] = []
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.supervisor = Supervisor(self.client, self.start, max_restarts, self.given_up.set_result)

    def start(self, life: EngineLife) -> None:
        self.lives.append(life)
        life.start(EngineConfig(model="none"), os.getpid(), self.settings, self.command)


def test_engines_that_end_at_once_are_not_replaced_for_ever() -> None:
    async def run() -> None:
        stage = Stage(ENDS)
        stage.supervisor.keep()
        stage.supervisor.begin()
        assert await asyncio.wait_for(stage.given_up, 60) == "it ended with exit code 3"
        assert len(stage.lives) == 3 and stage.client.restarts == 2
        assert not stage.client.healthy and "exit code 3" in stage.client.unavailable_because
        await stage.supervisor.close()
        assert not any(life._directory.path.exists() for life in stage.lives)

    asyncio.run(run())


def test_a_process_that_cannot_be_started_counts_as_lost() -> None:
    async def run() -> None:
        stage = Stage(("/no/such/program",), max_restarts=1)
        stage.supervisor.keep()
        stage.supervisor.begin()
        assert "could not be started" in await asyncio.wait_for(stage.given_up, 60)
        assert len(stage.lives) == 2
        await stage.supervisor.close()

    asyncio.run(run())


def test_the_first_engine_is_the_callers_care() -> None:
    async def run() -> None:
        stage = Stage(ENDS)
        life = stage.supervisor.begin()
        with pytest.raises(EngineUnavailable, match="exit code 3"):
            await asyncio.wait_for(asyncio.shield(life.ready), 60)
        await stage.supervisor.close()
        assert len(stage.lives) == 1 and not stage.given_up.done()

    asyncio.run(run())


def test_an_engine_that_never_loads_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "LOADING_S", 0.4)

    async def run() -> None:
        stage = Stage(SLEEPS, heartbeat_timeout=0.5, watchdog_timeout=0.6)
        life = stage.supervisor.begin()
        with pytest.raises(EngineUnavailable, match=r"silent for 0\.6 s"):
            await asyncio.wait_for(asyncio.shield(life.ready), 60)
        await stage.supervisor.close()
        assert life.process is not None and life.process.poll() is not None

    asyncio.run(run())


def test_closing_while_an_engine_loads_ends_it() -> None:
    async def run() -> None:
        stage = Stage(SLEEPS)
        life = stage.supervisor.begin()
        await asyncio.sleep(0.05)
        await stage.supervisor.close()
        assert life.process is not None and life.process.poll() is not None
        assert life.ended is None and not stage.lives[1:]

    asyncio.run(run())
