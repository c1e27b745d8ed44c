"""The table of attention backends, and how one is chosen for a model. Knows their names, not their modules."""

from __future__ import annotations

import importlib
import logging

from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.cache.kv_pool import KVPool
from losa_runtime.core.errors import ConfigError

logger = logging.getLogger(__name__)

BACKENDS: dict[str, str] = {
    "native": "losa_runtime.attention.native_backend:NativeBackend",
    "triton": "losa_runtime.attention.triton_backend:TritonBackend",
    "flashinfer": "losa_runtime.attention.flashinfer_backend:FlashInferBackend",
    "torch": "losa_runtime.attention.torch_backend:TorchBackend",
}
AUTO = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}  # the first that can serve the model


def backend_class(name: str) -> type[AttentionBackend]:
    """The backend of that name. Raises ConfigError."""
    if name not in BACKENDS:
        raise ConfigError(f"attention_backend: found {name!r}, allowed: {', '.join(BACKENDS)}")
    module, _, member = BACKENDS[name].partition(":")
    found = getattr(importlib.import_module(module), member)
    assert issubclass(found, AttentionBackend)
    return found


def own_bytes(name: str, config: BackendConfig) -> int:
    """Memory that the backend called `name` will take for good, beside the pages. Raises ConfigError."""
    if name == "auto" or _refusal(name, config) is not None:
        return 0
    return backend_class(name).own_bytes(config)


def make_backend(name: str, config: BackendConfig, pool: KVPool, scale: float | None = None) -> AttentionBackend:
    """Build the backend called `name`; "auto" is the first of AUTO that can serve `config`, with a line in the log.

    Raises ConfigError with the reasons if none can.
    """
    refused: list[str] = []
    for candidate in AUTO.get(config.device.type, ("torch",)) if name == "auto" else (name,):
        reason = _refusal(candidate, config)
        if reason is None:
            cls = backend_class(candidate)
            backend = cls(pool, config.num_heads, scale, config.same_bits, config.context_length)
            if name == "auto":
                detail = "; ".join(filter(None, (backend.detail, *refused)))
                logger.info("attention_backend auto: %s%s", candidate, f" ({detail})" if detail else "")
            return backend
        refused.append(f"{candidate!r} cannot serve this model: {reason}")
    raise ConfigError(f"attention_backend: {'; '.join(refused)}")


def _refusal(name: str, config: BackendConfig) -> str | None:
    """None, or why the backend called `name` cannot serve `config`. Raises ConfigError if there is none."""
    try:
        return backend_class(name).supports(config)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in ("", "losa_runtime", "losa_kernels"):
            raise
        return f"the package {package!r} is not installed"
