"""LoSA (arXiv 2604.12056): only the rows whose query changed are recomputed, over few pages; the rest is remembered.

First step of a block: dense prefix attention for all rows; output and log-sum-exp are kept. Later steps, per layer:
  1. change of row i = mean squared difference of its query to that of the previous step (section on locality),
  2. the most changed rows are active: one set per layer, shared by all heads,
  3. active rows select pages by QUEST's bounds; all of them read the union of their choices,
  4. their fresh output and log-sum-exp replace the remembered ones; stable rows keep theirs,
  5. the result is merged with dense attention inside the block (done by the caller).

Decided here, because the paper leaves it open: 5 of 16 rows are active by default; a KV group shares one list (largest
score among its query heads); active rows read the whole union and not their own part of it; no layer is kept dense and
nothing is refreshed densely inside a block; the reference of the change is the previous step and not the last refresh;
a prefix within the budget is read whole, by active rows only, so that just staleness remains.
S segments, B block length, R = S * B rows, H query heads, D head dim.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, AttnState, PrefixPlan
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.sparse.method import SparseMethod
from losa_runtime.sparse.pages import plan_pages
from losa_runtime.sparse.step import DenoiseStep


class Losa(SparseMethod):
    """Remembers, per slot and layer, the previous query and the prefix attention of each row of the current block."""

    summaries: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_BOUNDS})
    has_active_rows: ClassVar[bool] = True

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        q_SBHD = q_RHD.view(len(step.slots), self.geometry.block_length, *q_RHD.shape[1:])
        before_XBHD = self.memory.query(layer, q_RHD)
        if all(step.opens):
            rows = None
            before_XBHD[step.slots_S] = q_SBHD
        else:
            rules = (step.active_count_S, step.active_tau_S)
            rows = backend.changed_rows(q_SBHD, before_XBHD, step.slots_S, step.opens, *rules)
        whole = tuple(first or covered for first, covered in zip(step.opens, step.whole, strict=True))
        return plan_pages(layer, q_RHD, rows, whole, step, backend, self.geometry)

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: AttnState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> AttnState:
        return self.memory.renew(layer, plan.rows, got, step)
