"""What of the prefix is read: the interface of a sparse method, its parameters and the table of methods.

A method turns queries into a `PrefixPlan` and may keep state per slot. It does not know how attention is computed,
which model it serves, or what is unmasked. S segments, B block length, R = S * B rows, H query heads, D head dim.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, AttnState, PrefixPlan, RowGroup
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams

METHODS: dict[str, str] = {
    "dense": "losa_runtime.sparse.dense:Dense",
    "quest": "losa_runtime.sparse.quest:Quest",
    "losa": "losa_runtime.sparse.losa:Losa",
}
ALL_ROWS = ActiveRule("ratio", 1.0)


class Geometry(NamedTuple):
    """The fixed sizes a method works with. max_slots: requests that may hold method state at once."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_length: int
    page_size: int
    max_slots: int
    device: torch.device


class DenoiseStep:
    """What a method sees of its block segments in one forward: made once, used by every layer.

    group: the segments and their rows. slots: state index per segment. opens: per segment, True in the first step of
    its block. whole: per segment, True where the budget covers the prefix.
    """

    def __init__(self, group: RowGroup, device: torch.device) -> None:
        params = [segment.sparse for segment in group.segments]
        assert None not in params, "a block segment without sparse parameters"
        self.group, self._device = group, device
        self.params: tuple[SparseParams, ...] = tuple(p for p in params if p is not None)
        self.slots = tuple(segment.slot for segment in group.segments)
        assert len(set(self.slots)) == len(self.slots), f"two segments share a slot: {self.slots}"
        self.opens = tuple(segment.mode is ForwardMode.OPEN for segment in group.segments)
        pairs = zip(group.prefix_lens, self.params, strict=True)
        self.whole = tuple(prefix_len <= p.token_budget for prefix_len, p in pairs)

    @cached_property
    def slots_S(self) -> Tensor:
        """`slots` on the device, int64."""
        return self.tensor(self.slots, torch.int64)

    @cached_property
    def budget_S(self) -> Tensor:
        """Token budget per segment, int64."""
        return self.tensor([p.token_budget for p in self.params], torch.int64)

    @cached_property
    def active_count_S(self) -> Tensor:
        """Rows to recompute by the count and ratio rules, int64; 0 under the tau rule."""
        return self.tensor([_active_count(p.active, self.group.block_length) for p in self.params], torch.int64)

    @cached_property
    def active_tau_S(self) -> Tensor:
        """Share of the change to be covered under the tau rule, float32; 0 under the others."""
        shares = [p.active.value if p.active.kind == "tau" else 0.0 for p in self.params]
        return self.tensor(shares, torch.float32)

    def tensor(self, values: Collection[Any], dtype: torch.dtype) -> Tensor:
        """Host values on the group's device."""
        return torch.tensor(values, dtype=dtype, device=self._device)


class SparseMethod(ABC):
    """One published method. Its state, if any, is indexed by slot, begins with OPEN and ends with `release`.

    summaries: what it needs of each page. has_active_rows, has_budget: whether the request's `active_*` and
    `token_budget` mean anything to it.
    """

    summaries: ClassVar[frozenset[Summary]] = frozenset()
    has_active_rows: ClassVar[bool] = False
    has_budget: ClassVar[bool] = True

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    @abstractmethod
    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        """What to read for these rows. Called exactly once per layer and forward, as it may update state."""

    def complete(self, layer: int, plan: PrefixPlan, got: AttnState, step: DenoiseStep) -> AttnState:
        """Prefix attention of all R rows from that of the planned rows."""
        assert plan.rows is None
        return got

    def release(self, slot: int) -> None:  # noqa: B027 - a method without state has nothing to forget
        """Forget a slot, whether or not it was used: its block has ended. Reading it again needs OPEN first."""

    @classmethod
    def state_bytes(cls, geometry: Geometry, itemsize: int) -> int:
        """Memory that the method's state will take once it is used; itemsize: bytes of a query's number."""
        return 0

    @classmethod  # noqa: B027 - most methods serve everything
    def check(cls, params: SparseParams, geometry: Geometry) -> None:
        """Raise InvalidRequest if the method cannot serve these (otherwise valid) parameters."""


def method_class(name: str) -> type[SparseMethod]:
    """The method of that name, which must be in the table."""
    module, _, member = METHODS[name].partition(":")
    found = getattr(importlib.import_module(module), member)
    assert issubclass(found, SparseMethod)
    return found


def make_methods(geometry: Geometry) -> dict[str, SparseMethod]:
    """Every method by name. State is allocated when a method is first used."""
    return {name: method_class(name)(geometry) for name in METHODS}


def total_state_bytes(geometry: Geometry, itemsize: int) -> int:
    """Memory for the state of all methods: any request may choose any of them, so it is kept free from the start."""
    return sum(method_class(name).state_bytes(geometry, itemsize) for name in METHODS)


def declared_summaries() -> frozenset[Summary]:
    """What the page pool has to keep so that each request may choose its method."""
    return frozenset().union(*(method_class(name).summaries for name in METHODS))


def default_active_tokens(block_length: int) -> int:
    """5 of 16 rows, scaled: the size that fits the densities published for LoSA at block length 16."""
    return max(1, round(5 / 16 * block_length))


def resolve(wanted: DiffusionParams, config: EngineConfig, geometry: Geometry) -> SparseParams:
    """Settle a request's sparse parameters: its own wishes, else the engine's defaults, else the documented ones.

    The engine's defaults are checked on every call, so resolve(DiffusionParams(), …) at start proves them.
    Raises InvalidRequest for what the request asked, ConfigError for what the configuration says.
    """
    _check_budget(config.token_budget, geometry.page_size, None)
    _active_rule(config, geometry.block_length, None)
    _check_name(config.sparse_method, None)
    name = config.sparse_method if wanted.sparse_method is None else wanted.sparse_method
    _check_name(name, wanted)
    method = method_class(name)
    budget, active = config.token_budget, ALL_ROWS
    if wanted.token_budget is not None:
        if not method.has_budget:
            raise _refusal(wanted, "token_budget", wanted.token_budget, f"absent: {name!r} reads the whole prefix")
        _check_budget(wanted.token_budget, geometry.page_size, wanted)
        budget = wanted.token_budget
    asked = _active_rule(wanted, geometry.block_length, wanted)
    if method.has_active_rows:
        default = ActiveRule("count", default_active_tokens(geometry.block_length))
        active = asked or _active_rule(config, geometry.block_length, None) or default
    elif asked is not None:
        field = f"active_{'tokens' if asked.kind == 'count' else asked.kind}"
        raise _refusal(wanted, field, asked.value, f"absent: {name!r} recomputes every row in every step")
    params = SparseParams(name, budget, active)
    method.check(params, geometry)
    return params


def _refusal(source: DiffusionParams | None, field: str, found: object, allowed: str) -> InvalidRequest | ConfigError:
    """An answer to whoever gave the value: the request, or (None) the engine's configuration."""
    if source is None:
        return ConfigError(f"{field}: found {found!r}, allowed: {allowed}")
    return InvalidRequest(f"custom_params.{field}", found, allowed)


def _check_name(name: str, source: DiffusionParams | None) -> None:
    if name not in METHODS:
        raise _refusal(source, "sparse_method", name, ", ".join(METHODS))


def _check_budget(budget: int, page_size: int, source: DiffusionParams | None) -> None:
    """Selection works in whole pages; rounding silently would make two budgets one."""
    if budget > 0 and budget % page_size == 0:
        return
    below = max(budget, 0) // page_size * page_size
    near = f"{below} or {below + page_size}" if below else f"{page_size}"
    raise _refusal(source, "token_budget", budget, f"a positive multiple of the page size {page_size}, e.g. {near}")


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


def _active_count(rule: ActiveRule, block_length: int) -> int:
    """Rows by count, or by ratio rounded up so that a positive share is never no row."""
    if rule.kind == "tau":
        return 0
    return int(rule.value) if rule.kind == "count" else math.ceil(rule.value * block_length)
