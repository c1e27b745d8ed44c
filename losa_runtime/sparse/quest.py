"""QUEST (arXiv 2406.10774), adapted to blocks: every row selects its pages anew in every step.

The paper decodes one query at a time. Adapted as the LoSA paper's baseline: all B rows of a block select with the
page bounds and read the union of their choices. Decided here, where neither paper says: the first step of a block is
sparse like every other, no layer is kept dense, a KV group shares one list (largest score among its query heads), and
no page is forced into the selection (the current tokens are in the block, not in the prefix).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, PrefixPlan
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.sparse.method import SparseMethod
from losa_runtime.sparse.pages import plan_pages
from losa_runtime.sparse.step import DenoiseStep


class Quest(SparseMethod):
    """Top pages per row by the bound of q . k, without state. A prefix within the budget is read whole."""

    summaries: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_BOUNDS})

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        return plan_pages(layer, q_RHD, None, step.whole, step, backend, self.geometry)
