"""Choosing pages by bounds: the step that QUEST and LoSA share. Keeps no state and knows no rule about rows.

R rows, S segments, B block length, H query heads, G KV heads, D head dim, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.reference.selection import share_scores, top_pages, union_rows
from losa_runtime.attention.backend import AttentionBackend, KVIndices, PrefixPlan, ScoreKind
from losa_runtime.sparse.method import DenoiseStep, Geometry


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
    head; the score of a page for a KV head is the largest among its query heads, so that one list serves the group.
    """
    if all(whole):
        return PrefixPlan(rows)
    device, block, segments = q_RHD.device, step.group.block_length, len(whole)
    scored = torch.arange(q_RHD.shape[0], device=device) if rows is None else rows
    if any(whole):
        scored = scored[~step.tensor(whole, torch.bool)[scored // block]]
    segment_R = scored // block
    if scored.shape[0] == 0:
        chosen = torch.zeros(segments, geometry.num_kv_heads, 0, dtype=torch.bool, device=device)
        return PrefixPlan(rows, KVIndices.from_mask(chosen, whole), geometry.page_size)
    scores_RHP = backend.kv_scores(layer, q_RHD, scored, ScoreKind.BOUND, geometry.page_size, step.group)
    scores_RGP = share_scores(scores_RHP, geometry.num_kv_heads)
    chosen_RGP = top_pages(scores_RGP, step.budget_S[segment_R] // geometry.page_size)
    chosen_SGP = union_rows(chosen_RGP, segment_R, segments)
    seen = torch.bincount(segment_R, minlength=segments).tolist()
    return PrefixPlan(
        rows, KVIndices.from_mask(chosen_SGP, whole), geometry.page_size, tuple(count > 0 for count in seen)
    )
