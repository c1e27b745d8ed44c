"""Choosing pages by bounds: the step that QUEST and LoSA share. Keeps no state and knows no rule about rows.

R rows, H query heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, PrefixPlan
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.step import DenoiseStep


def plan_pages(
    layer: int,
    q_RHD: Tensor,
    rows: Tensor | None,
    whole: tuple[bool, ...],
    step: DenoiseStep,
    backend: AttentionBackend,
    geometry: Geometry,
) -> PrefixPlan:
    """Read, for these rows (None = all), the pages with the best bounds; the rows of a segment share the union.

    whole: segments that read their whole prefix and are not scored. Each row selects budget / page_size pages per KV
    head.
    """
    if all(whole):
        return PrefixPlan(rows)
    best_S = step.budget_S // geometry.page_size
    kv, scored = backend.select_pages(layer, q_RHD, rows, whole, best_S, step.group)
    return PrefixPlan(rows, kv, geometry.page_size, scored)
