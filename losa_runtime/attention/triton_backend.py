"""The GPU backend that needs nothing but Triton."""

from __future__ import annotations

from losa_runtime.attention.device_backend import DeviceBackend


class TritonBackend(DeviceBackend):
    """See `DeviceBackend`; every kernel is its own."""
