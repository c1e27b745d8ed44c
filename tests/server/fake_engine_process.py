"""The engine process around the echo: `python -m tests.server.fake_engine_process`."""

from __future__ import annotations

import sys

from losa_server.engine_process import main
from tests.server.fake_engine import FakeEngine

if __name__ == "__main__":
    sys.exit(main(FakeEngine))
