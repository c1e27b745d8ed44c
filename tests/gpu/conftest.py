"""Whoever asks for these tests asks for a GPU: without one they fail and say so. A test that is left out is no test."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.platforms import HAS_TRITON

if not HAS_TRITON:  # nor can there be a GPU that these tests know
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("tests marked `gpu` need one, and torch sees none here (make setup CUDA=1)", pytrace=False)
    torch.manual_seed(0)
