"""The C++ kernels as tests see them: there wherever there is a compiler, at every SIMD level of this CPU."""

from __future__ import annotations

import os
import shutil

import pytest

from losa_kernels.native.library import LEVELS, Kernels, NativeUnavailable


def require_native(level: str | None = None) -> Kernels:
    """The kernels. Skips only where they cannot exist: without a C++ compiler, or on a CPU without that level."""
    try:
        return Kernels(level)
    except NativeUnavailable as unavailable:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler and "this CPU offers" not in str(unavailable):
            raise
        pytest.skip(str(unavailable))


each_level = pytest.mark.parametrize("kernels", LEVELS, indirect=True)
