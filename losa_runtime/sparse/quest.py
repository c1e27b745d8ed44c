"""QUEST (arXiv 2406.10774), adapted to blocks: every row selects its pages anew in every step.

The paper decodes one query at a time. Adapted as the LoSA paper's baseline: all B rows of a block select with the
page bounds and read the union of their choices. Decided here as defaults (see the options), where neither paper says:
the first step of a block is sparse like every other, no layer is kept dense, and a KV group shares one list (largest
score among its query heads). Decided for good: no page is forced into the selection (the current tokens are in the
block, not in the prefix), and a prefix within the budget is read whole.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.pages import PageOptions, plan_pages
from losa_runtime.sparse.step import DenoiseStep


class QuestOptions(PageOptions):
    """What QUEST leaves open in a block."""

    first_step: Literal["sparse", "dense"] = "sparse"
    """The first step of a block: selected like every other, or all rows over the whole prefix as LoSA does it."""


class Quest(SparseMethod):
    """Top pages per row by the bound of q . k, without state."""

    Options: ClassVar[type[MethodOptions]] = QuestOptions
    summaries: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_BOUNDS})

    @classmethod
    def recordable(cls, options: BaseModel) -> bool:
        assert isinstance(options, QuestOptions)
        return options.common_lists

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        options = step.options
        assert isinstance(options, QuestOptions)
        if layer < options.dense_layers:
            return PrefixPlan()
        dense = step.opens if options.first_step == "dense" else (False,) * len(step.slots)
        whole = tuple(covered or all_ for covered, all_ in zip(step.whole, dense, strict=True))
        return plan_pages(layer, q_RHD, None, whole, options, step, backend, self.geometry)
