"""What many rooms' tests share: small checkpoints made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.result_file import circumstances, keep_row
from losa_runtime.models.random_checkpoint import write_random_checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be there before anything imports triton
torch.set_num_threads(1)  # tiny models: threads cost more than they bring


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where `record` keeps what it is told."""
    parser.addoption("--record", type=Path, metavar="FILE", help="keep the figures of long tests, one row for each")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(NAME, FIGURE=…)` prints figures and, with --record, keeps them in place of those of the run before."""

    def keep(benchmark: str, **figures: Any) -> None:
        row = {"benchmark": benchmark, **figures}
        print(f"\n{json.dumps(row)}")
        path = request.config.getoption("record")
        if path is not None:
            keep_row(path, {**row, **circumstances(torch.device("cpu"))})

    return keep


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDAR of three layers with block length 16."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, preset="tiny", seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_b4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with block length 4, smaller than a page."""
    folder = tmp_path_factory.mktemp("tiny_b4")
    write_random_checkpoint(folder, preset="tiny", seed=1, block_size=4)
    return folder


@pytest.fixture(scope="session")
def bundled_checkpoint() -> Path:
    """The trained model that comes with the project."""
    return Path(__file__).parents[1] / "benchmarks" / "tiny_model" / "checkpoint"
