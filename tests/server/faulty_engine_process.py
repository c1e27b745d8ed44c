"""The engine process around the real engine with faults: `python -m tests.server.faulty_engine_process`.

Token RAISES makes the model raise in its second layer, token BREAKS has an embedding that is no number.
"""

from __future__ import annotations

import sys

from losa_runtime.core.config import EngineConfig
from losa_server.engine_loop import EngineFace
from losa_server.engine_process import load_engine, main

RAISES, BREAKS = 1500, 1501


def faulty(config: EngineConfig) -> EngineFace:
    """The real engine, made faulty."""
    from losa_runtime.engine import Engine
    from tests.engine.faults import break_embedding, install, raises_on

    engine = load_engine(config)
    assert isinstance(engine, Engine)
    break_embedding(engine, BREAKS)
    install(engine, raises_on(RAISES))
    return engine


if __name__ == "__main__":
    sys.exit(main(faulty))
