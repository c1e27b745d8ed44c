"""Gathering planned queries into the layout of paged attention with one page list per KV head.

S segments, R rows, H query heads, G KV heads, F = H / G, D head dim, C splits of a list, A slots for rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Planned, check


def fold_queries(
    q_RHD: Tensor, planned: Planned, kv_heads: int, slots: int, splits: int = 1, room: int | None = None
) -> Tensor:
    """The planned rows of each segment, for each KV head and split, in `slots` places: [S, G, C, A, F, D].

    In the dtype of q. slots: bound on the planned rows of a segment. Places without a row are 0. room: segments that
    there is room for (None: as many as there are); what lies behind the last one is undefined. Raises ValueError.
    """
    heads, dim = check("q", q_RHD, (None, None, None), *FLOATS).shape[1:]
    segments = check("indptr", planned.indptr, (None,), torch.int64).shape[0] - 1
    share, rest = divmod(heads, kv_heads)
    if rest:
        raise ValueError(f"q: found {heads} heads, allowed: multiples of {kv_heads}")
    if room is not None and room < segments:
        raise ValueError(f"room: found {room}, allowed: at least the {segments} segments")
    folded = q_RHD.new_empty(segments if room is None else room, kv_heads, splits, slots, share, dim)
    launch(
        _fold_kernel,
        (segments, slots, splits),
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
    """Program (segment, slot, split)."""
    segment, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(row_indptr + segment) + slot
    taken = place < tl.load(row_indptr + segment + 1)
    row = tl.load(rows + place, mask=taken, other=0)
    head, d = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    mask = (head < HEADS)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + (row * HEADS + head)[:, None] * DIM + d[None, :], mask=mask & taken, other=0.0)
    entry = (segment * (HEADS // SHARE) + head // SHARE) * tl.num_programs(2) + tl.program_id(2)
    vector = (entry * tl.num_programs(1) + slot) * SHARE + head % SHARE
    tl.store(folded + vector[:, None] * DIM + d[None, :], query, mask=mask)
