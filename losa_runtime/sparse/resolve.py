"""From wishes to settled sparse parameters: a request's own, else the engine's defaults, else the documented ones."""

from __future__ import annotations

from pydantic import ValidationError

from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.batch import ActiveRule, SparseParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, InvalidRequest, invalid_request
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import METHODS, MethodOptions, SparseMethod, declared_summaries, method_class

ALL_ROWS = ActiveRule("ratio", 1.0)
DEFAULT_BUDGET = 1024  # tokens; the largest budget in LoSA's tables


def default_active_tokens(block_length: int) -> int:
    """5 of 16 rows, scaled: the size that fits the densities published for LoSA at block length 16."""
    return max(1, round(5 / 16 * block_length))


def resolve(wanted: DiffusionParams, config: EngineConfig, geometry: Geometry) -> SparseParams:
    """Settle a request's sparse parameters.

    The engine's defaults are checked on every call, so resolve(DiffusionParams(), …) at start proves them.
    Raises InvalidRequest for what the request asked, ConfigError for what the configuration says.
    """
    _check_offer(config)
    if config.token_budget is not None:
        _check_budget(config.token_budget, geometry, None)
    _active_rule(config, geometry.block_length, None)
    defaults = _options(method_class(config.sparse_method), config.sparse_method, config.sparse_options, None)
    name = config.sparse_method if wanted.sparse_method is None else wanted.sparse_method
    _check_name(name, wanted, config)
    method = method_class(name)
    given = wanted.sparse_options or {}
    if name == config.sparse_method:
        given = defaults.model_dump(exclude_unset=True) | given
    options = _options(method, name, given, wanted)
    params = SparseParams(
        method=name,
        token_budget=_budget(method, name, options, wanted, config, geometry),
        active=_rule(method, name, wanted, config, geometry.block_length),
        options=options,
        planned_steps=wanted.denoising_steps or config.denoising_steps or geometry.block_length,
    )
    try:
        method.check(params, geometry)
    except InvalidRequest as problem:
        if wanted == DiffusionParams():
            raise ConfigError(str(problem).removeprefix("custom_params.")) from None
        raise
    return params


def offered_methods(config: EngineConfig) -> tuple[str, ...]:
    """The methods that requests may choose."""
    return tuple(METHODS) if config.sparse_methods is None else config.sparse_methods


def kept_summaries(config: EngineConfig) -> frozenset[Summary]:
    """What pages keep beside K/V: what the offered methods need, and what helps those that the configuration names.

    What merely helps a method is not kept for the reason that all methods are offered: every request pays its memory.
    """
    named = (config.sparse_method,) if config.sparse_methods is None else config.sparse_methods
    return declared_summaries(offered_methods(config), named)


def _refusal(source: DiffusionParams | None, field: str, found: object, allowed: str) -> InvalidRequest | ConfigError:
    """An answer to whoever gave the value: the request, or (None) the engine's configuration."""
    if source is None:
        return ConfigError(f"{field}: found {found!r}, allowed: {allowed}")
    return InvalidRequest(f"custom_params.{field}", found, allowed)


def _check_offer(config: EngineConfig) -> None:
    """The configuration's own names."""
    for name in offered_methods(config):
        if name not in METHODS:
            raise _refusal(None, "sparse_methods", name, ", ".join(METHODS))
    _check_name(config.sparse_method, None, config)


def _check_name(name: str, source: DiffusionParams | None, config: EngineConfig) -> None:
    offered = offered_methods(config)
    if name in offered:
        return
    allowed = ", ".join(offered)
    if name in METHODS:
        missing = method_class(name).summaries - declared_summaries(offered)
        kept = f"its pages keep no {', '.join(sorted(kind.name.lower() for kind in missing))}" if missing else ""
        allowed += f" (this engine was started without {name!r} in sparse_methods{'; ' + kept if kept else ''})"
    raise _refusal(source, "sparse_method", name, allowed)


def _budget(
    method: type[SparseMethod],
    name: str,
    options: MethodOptions,
    wanted: DiffusionParams,
    config: EngineConfig,
    geometry: Geometry,
) -> int:
    if wanted.token_budget is not None:
        if not method.has_budget:
            raise _refusal(wanted, "token_budget", wanted.token_budget, f"absent: {name!r} selects nothing")
        instead = method.instead_of_budget(options)
        if instead is not None:
            raise _refusal(wanted, "token_budget", wanted.token_budget, f"absent beside sparse_options.{instead}")
        _check_budget(wanted.token_budget, geometry, wanted)
        return wanted.token_budget
    if config.token_budget is not None:
        return config.token_budget
    page = geometry.page_size
    return max(page, min(DEFAULT_BUDGET, geometry.context_length) // page * page)


def _check_budget(budget: int, geometry: Geometry, source: DiffusionParams | None) -> None:
    """Selection works in whole pages; rounding silently would make two budgets one."""
    page, most = geometry.page_size, max(geometry.page_size, geometry.context_length)
    if budget > most:
        raise _refusal(source, "token_budget", budget, f"at most the context length {most}")
    if budget > 0 and budget % page == 0:
        return
    below = max(budget, 0) // page * page
    near = f"{below} or {below + page}" if below else f"{page}"
    raise _refusal(source, "token_budget", budget, f"a positive multiple of the page size {page}, e.g. {near}")


def _options(
    method: type[SparseMethod], name: str, given: dict[str, bool | int | float | str], source: DiffusionParams | None
) -> MethodOptions:
    """The method's options; unknown ones and values out of range are refused by name."""
    try:
        return method.Options.model_validate(given)
    except ValidationError as error:
        problem = invalid_request("sparse_options", error)
        allowed = problem.allowed
        if allowed == "a known key":
            known = ", ".join(method.Options.model_fields)
            allowed = f"an option of {name!r}: {known}" if known else f"absent: {name!r} has no options"
        raise _refusal(source, problem.field, problem.found, allowed) from None


def _rule(
    method: type[SparseMethod], name: str, wanted: DiffusionParams, config: EngineConfig, block_length: int
) -> ActiveRule:
    asked = _active_rule(wanted, block_length, wanted)
    if method.has_active_rows:
        default = ActiveRule("count", default_active_tokens(block_length))
        return asked or _active_rule(config, block_length, None) or default
    if asked is not None:
        field = f"active_{'tokens' if asked.kind == 'count' else asked.kind}"
        raise _refusal(wanted, field, asked.value, f"absent: {name!r} has no rule about active rows")
    return ALL_ROWS


def _active_rule(
    given: DiffusionParams | EngineConfig, block_length: int, source: DiffusionParams | None
) -> ActiveRule | None:
    """The rule that is set, at most one of three."""
    values = {"count": given.active_tokens, "ratio": given.active_ratio, "tau": given.active_tau}
    rules = [(kind, value) for kind, value in values.items() if value is not None]
    if len(rules) > 1:
        names = "active_tokens, active_ratio, active_tau"
        raise _refusal(source, names, [value for _, value in rules], "at most one of the three")
    if given.active_tokens is not None and given.active_tokens > block_length:
        raise _refusal(source, "active_tokens", given.active_tokens, f"at most the block length {block_length}")
    for kind in ("count", "ratio", "tau"):
        value = values[kind]
        if value is not None:
            return ActiveRule(kind, float(value))
    return None
