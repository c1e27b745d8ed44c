"""Which decoding algorithms there are, and how a request's decoding parameters are settled. Loads no tensor library.

The names are needed where requests are checked, the code only where tokens are accepted: so the table holds module
paths, and an algorithm is imported when it is first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.decoding.presets import PRESETS

if TYPE_CHECKING:
    from losa_runtime.decoding.algorithm import DecodingAlgorithm

# name -> "module:class"
ALGORITHMS: dict[str, str] = {
    "sequential": "losa_runtime.decoding.sequential:Sequential",
    "low_confidence_static": "losa_runtime.decoding.low_confidence_static:LowConfidenceStatic",
    "low_confidence_dynamic": "losa_runtime.decoding.low_confidence_dynamic:LowConfidenceDynamic",
    "entropy_bounded": "losa_runtime.decoding.entropy_bounded:EntropyBounded",
    "margin": "losa_runtime.decoding.margin:Margin",
    "random": "losa_runtime.decoding.random_order:RandomOrder",
    "joint_threshold": "losa_runtime.decoding.joint_threshold:JointThreshold",
}
KNOBS = ("threshold", "entropy_bound", "edit_threshold", "post_edit_steps", "neighbour_penalty")  # of some of them only


def resolve(params: DiffusionParams, config: EngineConfig, block_length: int) -> DecodingParams:
    """Settle a request's decoding parameters: its own, else its preset's, else the engine's; of
    denoising_steps, else one token per step.

    Raises InvalidRequest for a request's value, ConfigError for the engine's: resolve an empty DiffusionParams once at
    start and a wrong default never meets a request.
    """
    if params.preset is not None and params.preset not in PRESETS:
        raise _refusal("preset", params.preset, f"one of {', '.join(PRESETS)}", True)
    preset = PRESETS.get(params.preset or "")

    def settled(name: str) -> Any:
        """The request's own value, else its preset's, else the engine's."""
        for where in (params, preset):
            value = None if where is None else getattr(where, name, None)
            if value is not None:
                return value
        return getattr(config, name)

    algorithm = settled("algorithm")
    if algorithm not in ALGORITHMS:
        raise _refusal("algorithm", algorithm, f"one of {', '.join(ALGORITHMS)}", params.algorithm is not None)
    steps = settled("denoising_steps")
    if steps is not None and not 1 <= steps <= block_length:
        allowed = f"1 to {block_length} (the block length)"
        raise _refusal("denoising_steps", steps, allowed, params.denoising_steps is not None)
    for knob in KNOBS:
        wish = getattr(params, knob)
        if wish is not None and knob not in load_algorithm(algorithm).knobs:
            raise _refusal(knob, wish, f"absent: {algorithm!r} does not read it", True)
    sub_block = _sub_block_length(params, config, algorithm, settled("sub_block_length"), block_length)
    if sub_block is not None and steps is not None and steps < block_length // sub_block:
        allowed = f"{block_length // sub_block} to {block_length}: each sub-block of {sub_block} takes a step"
        raise _refusal("denoising_steps", steps, allowed, params.denoising_steps is not None or _wanted(params))
    about = {knob: settled(knob) for knob in KNOBS}
    return DecodingParams(algorithm, num_steps=steps or block_length, sub_block_length=sub_block, **about)


def _sub_block_length(
    params: DiffusionParams, config: EngineConfig, algorithm: str, wish: int | None, block_length: int
) -> int | None:
    """The settled length, None for no sub-blocks: also for an algorithm that has none, where a preset or the engine's
    default named a length for others. Raises as `resolve`."""
    if wish is None:
        return None
    if load_algorithm(algorithm).edits:
        if params.sub_block_length is not None or (params.algorithm is None and params.preset is None):
            allowed = f"absent: {algorithm!r} edits a block as a whole until it ends"
            raise _refusal("sub_block_length", wish, allowed, params.sub_block_length is not None)
        return None
    if block_length % wish:
        allowed = f"a divisor of the block length of {block_length}"
        raise _refusal("sub_block_length", wish, allowed, _wanted(params))
    return wish if wish < block_length else None


def _wanted(params: DiffusionParams) -> bool:
    """Whether the request itself, or its preset, says how long sub-blocks are."""
    preset = PRESETS.get(params.preset or "")
    return params.sub_block_length is not None or (preset is not None and preset.sub_block_length is not None)


def settings_read(algorithm: str) -> list[str]:
    """The settings that mean anything to an algorithm; what edits goes on until it ends, without a plan."""
    rule = load_algorithm(algorithm)
    planned = () if rule.edits else ("denoising_steps", "sub_block_length")
    return sorted((*rule.knobs, *planned))


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
