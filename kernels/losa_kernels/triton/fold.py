"""Gathering planned queries into the layout of paged attention with one page list per KV head.

S segments, R rows, H query heads, G KV heads, F = H / G, D head dim, A slots for rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Planned, check


def fold_queries(q_RHD: Tensor, planned: Planned, kv_heads: int, slots: int) -> Tensor:
    """The planned rows of each segment for each KV head, in `slots` places: [S, G, A, F, D] in the dtype of q.

    slots: bound on the planned rows of a segment. Places without a row are 0. Raises ValueError.
    """
    heads, dim = check("q", q_RHD, (None, None, None), *FLOATS).shape[1:]
    segments = check("indptr", planned.indptr, (None,), torch.int64).shape[0] - 1
    share, rest = divmod(heads, kv_heads)
    if rest:
        raise ValueError(f"q: found {heads} heads, allowed: multiples of {kv_heads}")
    folded = q_RHD.new_empty(segments, kv_heads, slots, share, dim)
    launch(
        _fold_kernel,
        (segments, slots, 1),
        q=q_RHD,
        rows=planned.rows,
        row_indptr=planned.indptr,
        folded=folded,
        HEADS=heads,
        PADDED=power_of_two(heads),
        SHARE=share,
        DIM=dim,
        WIDTH=power_of_two(dim),
    )
    return folded


@triton.jit
def _fold_kernel(
    q: tl.tensor,
    rows: tl.tensor,
    row_indptr: tl.tensor,
    folded: tl.tensor,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Program (segment, slot)."""
    segment, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(row_indptr + segment) + slot
    taken = place < tl.load(row_indptr + segment + 1)
    row = tl.load(rows + place, mask=taken, other=0)
    head, d = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    mask = (head < HEADS)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + (row * HEADS + head)[:, None] * DIM + d[None, :], mask=mask & taken, other=0.0)
    entry = segment * (HEADS // SHARE) + head // SHARE
    vector = (entry * tl.num_programs(1) + slot) * SHARE + head % SHARE
    tl.store(folded + vector[:, None] * DIM + d[None, :], query, mask=mask)
