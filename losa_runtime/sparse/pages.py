"""Choosing pages by bounds: the step that QUEST and LoSA share. Keeps no state and knows no rule about rows.

R rows, n planned rows, H query heads, D head dim.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PageChoice, PrefixPlan, Rows
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import MethodOptions
from losa_runtime.sparse.step import DenoiseStep


class PageOptions(MethodOptions):
    """How pages are chosen and where nothing is chosen; neither paper says how to do it in a block."""

    share: Literal["max", "mean", "none"] = "max"
    """One list of pages per KV head, by the largest or the mean score of its query heads; "none": one per query head,
    as in QUEST's evaluation code. The heads of a group then load up to as many times more."""

    pages: Literal["union", "own"] = "union"
    """What a row reads: all that any row of its block chose, or its own choice. As much is loaded either way."""

    dense_layers: int = Field(default=0, ge=0, le=MAX_COUNT)
    """The first layers in which every row reads everything in every step. QUEST's code keeps two; here none, so that
    the density of methods can be compared and small models still select."""

    @property
    def common_lists(self) -> bool:
        """Whether the rows of a block and the query heads of a KV head share one list."""
        return self.share != "none" and self.pages == "union"


def plan_pages(
    layer: int,
    q_RHD: Tensor,
    rows: Rows | None,
    whole: tuple[bool, ...],
    options: PageOptions,
    step: DenoiseStep,
    backend: AttentionBackend,
    geometry: Geometry,
    heads_nH: Tensor | None = None,
) -> PrefixPlan:
    """Read, for these rows (None = all), the pages with the best bounds, in lists as `share` and `pages` say.

    whole: segments that read their whole prefix and are not scored. Each row selects budget / page_size pages per list.
    heads_nH: bool, the query heads of each row for which it selects (None = all); a list without any is empty.
    """
    if all(whole):
        return PrefixPlan(rows)
    choice, best = PageChoice(options.share, per_row=options.pages == "own"), step.best(geometry.page_size)
    kv, scored = backend.select_pages(layer, q_RHD, rows, whole, best, step.group, choice, heads_nH)
    return PrefixPlan(rows, kv, geometry.page_size, scored)
