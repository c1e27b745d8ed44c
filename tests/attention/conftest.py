"""The same random numbers in every order of tests."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

import pytest
import torch

# Elsewhere triton may not exist; here its absence is an error.
if (sys.platform, platform.machine()) != ("linux", "x86_64") and find_spec("triton") is None:
    collect_ignore_glob = ["test_flashinfer_*.py", "test_triton_*.py"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
