"""What of the prefix is read: the interface of a sparse method and the table of methods.

A method turns queries into a `PrefixPlan` and may keep state per slot. It does not know how attention is computed,
which model it serves, or what is unmasked. R rows of a group, H query heads, D head dim.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState, RenewedStates
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.memory import BlockMemory, Geometry
from losa_runtime.sparse.step import DenoiseStep

METHODS: dict[str, str] = {
    "dense": "losa_runtime.sparse.dense:Dense",
    "quest": "losa_runtime.sparse.quest:Quest",
    "losa": "losa_runtime.sparse.losa:Losa",
    "losa_plus": "losa_runtime.sparse.losa_plus:LosaPlus",
    "mage": "losa_runtime.sparse.mage:Mage",
    "sparsed": "losa_runtime.sparse.sparsed:SparseD",
    "flashblock": "losa_runtime.sparse.flashblock:FlashBlock",
    "sparse_dllm": "losa_runtime.sparse.sparse_dllm:SparseDllm",
    "ba_att": "losa_runtime.sparse.ba_att:BaAtt",
}


class MethodOptions(BaseModel):
    """A method's own options, all with defaults. Frozen: requests with equal options are computed together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SparseMethod(ABC):
    """One published method. Its state, if any, is indexed by slot, begins with OPEN and ends with `release`.

    Options: what a request may set in `sparse_options`. summaries: what it needs of each page; helpful: what it reads
    instead of keys where the pool keeps it, for the same answers to rounding. has_active_rows, has_budget: whether the
    request's `active_*` and `token_budget` mean anything to it.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    summaries: ClassVar[frozenset[Summary]] = frozenset()
    helpful: ClassVar[frozenset[Summary]] = frozenset()
    has_active_rows: ClassVar[bool] = False
    has_budget: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        self.geometry, self.memory = geometry, memory

    @abstractmethod
    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        """What to read for these rows. Called exactly once per layer and forward, as it may update state."""

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> PrefixState | RenewedStates:
        """Prefix attention of all R rows from that of the planned rows, `got`. Called once after `plan`; the backend
        settles the answer. plan.rows are the backend's if it chose them: to be handed on as they are."""
        assert plan.rows is None
        return got

    def release(self, slot: int) -> None:
        """Forget a slot, whether or not it was used: its block has ended. Reading it again needs OPEN first."""
        self.memory.close(slot)

    @classmethod
    def budget(cls, params: SparseParams, prefix_len: int) -> int:
        """Prefix tokens that each query may read."""
        return params.token_budget

    @classmethod
    def recordable(cls, options: BaseModel) -> bool:
        """Whether a later step, of segments whose budget does not cover their prefix, asks the same of the backend
        whatever its numbers are, so that it can be recorded: nothing depends on what only the host knows of them.
        """
        return False

    @classmethod
    def instead_of_budget(cls, options: MethodOptions) -> str | None:
        """The option that is set and takes the place of token_budget, if there is one."""
        return None

    @classmethod
    def state_bytes(cls, geometry: Geometry, itemsize: int) -> int:
        """Memory that the method's state will take once it is used, beside the `BlockMemory` shared by all."""
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


def make_methods(geometry: Geometry, names: Collection[str] = tuple(METHODS)) -> dict[str, SparseMethod]:
    """The methods of these names (all, unless said otherwise). State is allocated when a method is first used."""
    memory = BlockMemory(geometry)
    return {name: method_class(name)(geometry, memory) for name in names}


def total_state_bytes(geometry: Geometry, itemsize: int, names: Collection[str] = tuple(METHODS)) -> int:
    """Memory for the state of methods: any request may choose any of them, so it is kept free from the start.

    itemsize: bytes of a query's number.
    """
    own = sum(method_class(name).state_bytes(geometry, itemsize) for name in names)
    return BlockMemory.bytes(geometry, itemsize) + own


def declared_summaries(names: Collection[str] = tuple(METHODS), named: Collection[str] = ()) -> frozenset[Summary]:
    """What the page pool has to keep so that each request may choose among the methods `names`, and what helps those
    among `named`."""
    needed = frozenset[Summary]().union(*(method_class(name).summaries for name in names))
    return needed.union(*(method_class(name).helpful for name in named))
