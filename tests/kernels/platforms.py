"""Which backends tests run on a CPU beside those made for it."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

import torch

# Elsewhere triton may not exist; here its absence is an error. Where there is a GPU the interpreter is off (tests/gpu).
HAS_TRITON = (sys.platform, platform.machine()) == ("linux", "x86_64") or find_spec("triton") is not None
INTERPRETED: tuple[str, ...] = ()
if HAS_TRITON and not torch.cuda.is_available():
    from tests.kernels import interpreter as interpreter  # lets it serve

    INTERPRETED = ("triton",)
