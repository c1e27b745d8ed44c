"""losa-runtime: a serving runtime for block-diffusion language models with locality-aware sparse attention.

Importing this package is cheap on purpose: the HTTP process imports `losa_runtime.core` and must never load torch, so
the offline face is resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from losa_runtime.core.sampling_params import SamplingParams as SamplingParams
    from losa_runtime.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from losa_runtime.llm import LLM

        return LLM
    if name == "SamplingParams":
        from losa_runtime.core.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
