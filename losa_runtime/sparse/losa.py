"""LoSA (arXiv 2604.12056): only the rows whose query changed are recomputed, over few pages; the rest is remembered.

First step of a block: dense prefix attention for all rows; output and log-sum-exp are kept. Later steps, per layer:
  1. change of row i = mean squared difference of its query to that of the previous step (section on locality),
  2. the most changed rows are active: one set per layer, shared by all heads,
  3. active rows select pages by QUEST's bounds; all of them read the union of their choices,
  4. their fresh output and log-sum-exp replace the remembered ones; stable rows keep theirs,
  5. the result is merged with dense attention inside the block (done by the caller).

Decided here as defaults, because the paper leaves it open or can be read both ways; each is an option, so that it can
be measured: 5 of 16 rows are active (the request's `active_*`); one active set for all heads and not one per head
(granularity); the change is measured from the previous step and not from the last refresh (reference); the first step
is dense (first_step; the paper's ablation prefers it); active rows read the whole union and not their own part of it
(pages); a KV group shares one list, by the largest score among its query heads (share); nothing is refreshed densely
inside a block (refresh_every) and no layer is kept dense (dense_layers). Decided for good: a prefix within the budget
is read whole, by active rows only, so that just staleness remains.
S segments, B block length, R = S * B rows, n planned rows, H query heads, D head dim.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState, RenewedStates, Rows
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.memory import BlockMemory, Geometry
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.pages import PageOptions, plan_pages
from losa_runtime.sparse.step import DenoiseStep


class LosaOptions(PageOptions):
    """What LoSA leaves open."""

    granularity: Literal["layer", "head"] = "layer"
    """One active set per layer for all heads (how the paper's figures sort tokens), or one per query head by that
    head's part of the query. With "head" a row is computed if any of its heads is active, only active heads choose
    pages, and only their results replace remembered ones."""

    reference: Literal["step", "refresh"] = "step"
    """What a query is compared with: that of the previous step, as the paper says, or that of the row's (with
    granularity "head": the head's) last refresh. The first does not see a slow drift, the second bounds it."""

    first_step: Literal["dense", "sparse"] = "dense"
    """The first step of a block: all rows over the whole prefix, or over pages chosen as in later steps. Dense is
    what the paper does and found better."""

    refresh_every: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Steps n, 2 n, … of a block (counted from 0) recompute all rows over the whole prefix; 0: none does. The paper
    describes no such refresh. 1 is dense attention, but for a sparse first step."""


class Losa(SparseMethod):
    """Remembers, per slot and layer, an earlier query and the prefix attention of each row of the current block."""

    Options: ClassVar[type[MethodOptions]] = LosaOptions
    summaries: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_BOUNDS})
    has_active_rows: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._heads_nH: Tensor | None = None  # of the rows just planned, until they are completed

    @classmethod
    def recordable(cls, options: BaseModel) -> bool:
        assert isinstance(options, LosaOptions)
        return options.common_lists and options.granularity == "layer" and not options.refresh_every

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        options = step.options
        assert isinstance(options, LosaOptions)
        self.memory.begin(layer, step)
        if layer < options.dense_layers:
            return PrefixPlan()
        every = options.refresh_every
        refreshed = tuple(bool(every) and n > 0 and n % every == 0 for n in step.numbers)
        fresh = tuple(first or again for first, again in zip(step.opens, refreshed, strict=True))
        dense = fresh if options.first_step == "dense" else refreshed
        whole = tuple(covered or all_ for covered, all_ in zip(step.whole, dense, strict=True))
        rows, self._heads_nH = self._active(layer, q_RHD, fresh, options, step, backend)
        return plan_pages(layer, q_RHD, rows, whole, options, step, backend, self.geometry, self._heads_nH)

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> PrefixState | RenewedStates:
        options = step.options
        assert isinstance(options, LosaOptions)
        if layer < options.dense_layers:
            return got
        return self.memory.renew(layer, plan.rows, got, step, self._heads_nH)

    def _active(
        self,
        layer: int,
        q_RHD: Tensor,
        fresh: tuple[bool, ...],
        options: LosaOptions,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> tuple[Rows | None, Tensor | None]:
        """Rows to compute (None: all) and which of their heads, bool [n, H] (None: all); notes the queries.

        fresh: segments all of whose rows are computed.
        """
        q_SBHD = q_RHD.view(len(step.slots), self.geometry.block_length, *q_RHD.shape[1:])
        before_XBHD = self.memory.query(layer, q_RHD)
        if all(fresh):
            before_XBHD[step.slots_S] = q_SBHD
            return None, None
        rules = step.active_rules(fresh, keep_stable=options.reference == "refresh")
        asked = (q_SBHD, before_XBHD, step.slots_S, rules, step.group)
        if options.granularity == "layer":
            return backend.changed_rows(*asked), None
        heads_RH = backend.changed_heads(*asked)
        rows = heads_RH.any(1).nonzero().flatten()
        return rows, heads_RH[rows]
