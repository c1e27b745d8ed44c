"""The demonstration runs from start to end, and says so by its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.server_process import ROOT

DEMO = (sys.executable, "-m", "benchmarks.demo", "--tokens", "600", "--questions", "2", "--token-budget", "64")


@pytest.mark.slow
def test_demo() -> None:
    done = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("gen in one fork per question", "select", "came from the cache", "KV density", "less of the prefix"):
        assert words in done.stdout


@pytest.mark.slow
def test_demo_without_a_model(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--model", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "losa serve: error" in done.stdout
