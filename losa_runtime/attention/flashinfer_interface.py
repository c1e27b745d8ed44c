"""What is used of the package flashinfer-python, checked when a backend starts and imported not before.

Its releases change signatures and even meanings, so versions are named one by one and parameters are looked up. Only
its public class is used; what we rely on beyond signatures is written down by the fake in the tests.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from losa_runtime.core.errors import ConfigError

PACKAGE = "flashinfer-python"
VERSIONS = ("0.6.18.post1",)
WRAPPER = "BatchPrefillWithPagedKVCacheWrapper"
PARAMETERS: dict[str, tuple[str, ...]] = {
    "__init__": ("float_workspace_buffer", "kv_layout", "backend"),
    "plan": (
        *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"),
        *("num_qo_heads", "num_kv_heads", "head_dim_qk", "page_size", "causal", "sm_scale"),
        *("q_data_type", "kv_data_type", "max_token_per_sequence", "disable_split_kv"),
    ),
    "run": ("q", "paged_kv_cache", "out", "lse", "return_lse", "enable_pdl"),
    "reset_workspace_buffer": ("float_workspace_buffer", "int_workspace_buffer"),
}


def load_wrapper() -> Any:
    """The wrapper class. Raises ConfigError naming the package, what was found and what is needed."""
    needed = f"needed: {PACKAGE} {' or '.join(VERSIONS)} (make setup CUDA=1)"
    try:
        package = importlib.import_module("flashinfer")
    except Exception as error:  # its own import compiles and looks for devices: anything may go wrong
        raise ConfigError(f"{PACKAGE}: found no package that can be imported ({_line(error)}), {needed}") from error
    version = getattr(package, "__version__", None)
    if version not in VERSIONS:
        raise ConfigError(f"{PACKAGE}: found version {version}, {needed}")
    wrapper = getattr(package, WRAPPER, None)
    if wrapper is None:
        raise ConfigError(f"{PACKAGE} {version}: found no {WRAPPER}, {needed}")
    for method, names in PARAMETERS.items():
        found = _parameters(getattr(wrapper, method, None))
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(f"{PACKAGE} {version}: found no {', '.join(missing)} in {WRAPPER}.{method}, {needed}")
    return wrapper


def _parameters(method: Any) -> frozenset[str]:
    return frozenset() if method is None else frozenset(inspect.signature(method).parameters)


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
