"""The process that owns the engine and the device.

It is started as `python -m losa_server.engine_process` with an EngineStart as JSON on its standard input; what it does
then is in `engine_loop`. Importing it loads no torch.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from pydantic import ValidationError

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import LosaError
from losa_server.channel import Receiver, Sender, directory_of
from losa_server.engine_loop import EngineFace, EngineLoop
from losa_server.lifeline import watch_parent
from losa_server.logs import set_up
from losa_server.messages import TO_ENGINE, EngineFailed, EngineReady, EngineStart
from losa_server.pulse import Pulse, WorkClock

log = logging.getLogger("losa.engine")

EngineFactory = Callable[[EngineConfig], EngineFace]


def load_engine(config: EngineConfig) -> EngineFace:
    """The real engine. The only place that imports it, and with it torch."""
    from losa_runtime.engine import Engine

    return Engine(config)


def run_engine(start: EngineStart, factory: EngineFactory) -> int:
    """Load an engine, say so, and serve until the end; the exit code. A failure to load is told, not raised."""
    sender, receiver = Sender(start.to_frontend), Receiver(start.to_engine, TO_ENGINE)
    clock = WorkClock()
    pulse = Pulse(start.to_frontend, start.beat_s, clock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    faulthandler.register(signal.SIGUSR1)  # the parent asks for all stacks before it kills a process that hangs
    try:
        engine = factory(start.config)
        loop = EngineLoop(engine, receiver, sender, clock)

        def on_term(_signal: int, _frame: FrameType | None) -> None:
            loop.stop()

        signal.signal(signal.SIGTERM, on_term)
        sender.send(EngineReady(info=engine.info()))
        return loop.run()
    except LosaError as error:
        sender.send(EngineFailed(message=str(error)))
        return 1
    except Exception as error:
        log.exception("the engine could not be loaded")
        sender.send(EngineFailed(message=f"{type(error).__name__}: {error}"))
        return 1
    finally:
        pulse.stop()
        receiver.close()
        sender.close()


def main(factory: EngineFactory = load_engine) -> int:
    """Entry of the process. factory: makes the engine of a configuration."""
    try:
        start = EngineStart.model_validate_json(sys.stdin.buffer.read())
    except ValidationError as error:
        print(f"losa: this process is started by the server, with its settings on stdin ({error})", file=sys.stderr)
        return 2
    set_up("engine", start.log_level, start.log_format)
    watch_parent(start.parent, directory_of(start.to_engine))
    return run_engine(start, factory)


if __name__ == "__main__":
    sys.exit(main())
