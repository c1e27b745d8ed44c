"""From which prefix on a request gets the sparse method that it asked for: the engine's rule, settled per request.

Introduces configuration, decoding and the measured costs to one another. Knows no queue and no pages.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from losa_runtime.core.batch import SparseParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.decoding.registry import load_algorithm
from losa_runtime.decoding.registry import resolve as resolve_decoding
from losa_runtime.runner.calibration import measure_costs
from losa_runtime.runner.model_runner import ModelRunner
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.min_context import MinContext
from losa_runtime.sparse.resolve import offered_methods
from losa_runtime.sparse.resolve import resolve as resolve_sparse

logger = logging.getLogger(__name__)


class LeastPrefix(NamedTuple):
    """dense: what blocks behind shorter prefixes read; None where "dense" is not offered, and nothing is too short."""

    rule: MinContext
    dense: SparseParams | None

    def of(self, sparse: SparseParams, decoding: DecodingParams) -> int:
        """In tokens. A rule with a threshold may be done in any number of steps; then two are counted: what a first
        step costs more has to come back in a single later one."""
        unknown = bool(load_algorithm(decoding.algorithm).knobs)
        return self.rule.of(sparse, min(2, decoding.num_steps) if unknown else decoding.num_steps)

    def table(self, config: EngineConfig, geometry: Geometry) -> dict[str, int | None]:
        """By offered method, with the engine's defaults; None = never, in this context length."""
        decoding = resolve_decoding(DiffusionParams(), config, geometry.block_length)
        found = {name: self.of(params, decoding) for name, params in _defaults(config, geometry).items()}
        return {name: least if least < geometry.context_length else None for name, least in found.items()}


def settle_least_prefix(config: EngineConfig, geometry: Geometry, runner: ModelRunner) -> LeastPrefix:
    """The rule as asked, or by a measurement on pages that are nobody's yet. Raises ConfigError."""
    defaults, wanted = _defaults(config, geometry), config.sparse_min_context
    if wanted != 0 and "dense" not in defaults:
        raise ConfigError(f"sparse_min_context: found {wanted!r}, allowed: 0, as sparse_methods lacks 'dense'")
    if wanted != "auto":
        return LeastPrefix(MinContext(wanted), defaults.get("dense"))
    began = time.perf_counter()
    found = LeastPrefix(measure_costs(runner, defaults, geometry.context_length), defaults["dense"])
    text = ", ".join(f"{name} {least}" for name, least in found.table(config, geometry).items() if name != "dense")
    logger.info("sparse_min_context auto: %s; measured in %.1f s", text, time.perf_counter() - began)
    return found


def _defaults(config: EngineConfig, geometry: Geometry) -> dict[str, SparseParams]:
    """Of every offered method."""
    wishes = {name: DiffusionParams(sparse_method=name) for name in offered_methods(config)}
    return {name: resolve_sparse(wish, config, geometry) for name, wish in wishes.items()}
