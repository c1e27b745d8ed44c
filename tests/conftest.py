"""What many rooms' tests share: small checkpoints made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from losa_runtime.models.random_checkpoint import write_random_checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be there before anything imports triton
torch.set_num_threads(1)  # tiny models: threads cost more than they bring


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
