"""Which decoding algorithms there are, and how a request's decoding parameters are settled. Loads no tensor library.

The names are needed where requests are checked, the code only where tokens are accepted: so the table holds module
paths, and an algorithm is imported when it is first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams

if TYPE_CHECKING:
    from losa_runtime.decoding.algorithm import DecodingAlgorithm

# name -> "module:class"
ALGORITHMS: dict[str, str] = {
    "sequential": "losa_runtime.decoding.sequential:Sequential",
    "low_confidence_static": "losa_runtime.decoding.low_confidence_static:LowConfidenceStatic",
    "low_confidence_dynamic": "losa_runtime.decoding.low_confidence_dynamic:LowConfidenceDynamic",
}


def resolve(params: DiffusionParams, config: EngineConfig, block_length: int) -> DecodingParams:
    """Settle a request's decoding parameters: its own, else the engine's; denoising_steps, else one token per step.

    Raises InvalidRequest for a request's value, ConfigError for the engine's: resolve an empty DiffusionParams once at
    start and a wrong default never meets a request.
    """
    algorithm = config.algorithm if params.algorithm is None else params.algorithm
    if algorithm not in ALGORITHMS:
        raise _refusal("algorithm", algorithm, f"one of {', '.join(ALGORITHMS)}", params.algorithm is not None)
    steps = config.denoising_steps if params.denoising_steps is None else params.denoising_steps
    if steps is not None and not 1 <= steps <= block_length:
        allowed = f"1 to {block_length} (the block length)"
        raise _refusal("denoising_steps", steps, allowed, params.denoising_steps is not None)
    if params.threshold is not None and not load_algorithm(algorithm).has_threshold:
        raise _refusal("threshold", params.threshold, f"absent: {algorithm!r} accepts by plan, not by threshold", True)
    threshold = config.threshold if params.threshold is None else params.threshold
    return DecodingParams(algorithm, threshold, block_length if steps is None else steps)


@cache
def load_algorithm(name: str) -> DecodingAlgorithm:
    """The algorithm of that name in `ALGORITHMS`; algorithms hold no state, so one of each is enough."""
    module, _, member = ALGORITHMS[name].partition(":")
    algorithm: DecodingAlgorithm = getattr(import_module(module), member)()
    return algorithm


def _refusal(name: str, found: object, allowed: str, from_request: bool) -> InvalidRequest | ConfigError:
    if from_request:
        return InvalidRequest(f"custom_params.{name}", found, allowed)
    return ConfigError(f"{name}: found {found!r}, allowed: {allowed}")
