"""Storing K/V rows into pages, and the bounds and moments of the keys of the pages that a store touches.

The first kernel notes how far each page is filled; of the rows of a page, the one stored furthest back then summarises
it, so rows may come in any order. T rows, G KV heads, D head dim, P pages of the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Pages, check


def store_rows(pages: Pages, k_TGD: Tensor, v_TGD: Tensor, locations_T: Tensor, filled_P: Tensor | None = None) -> None:
    """Write rows at page * page_size + offset, rounding to the dtype of the pages; also the bounds and moments kept.

    locations_T: int64, distinct. A summary covers the offsets up to the last one stored here. filled_P: int32 scratch,
    all 0 before and afterwards, needed with bounds or moments; stores that share it must not overlap in time. Raises
    ValueError.
    """
    rows = check("locations", locations_T, (None,), torch.int64).shape[0]
    check("k", k_TGD, (rows, pages.kv_heads, pages.head_dim), *FLOATS)
    check("v", v_TGD, tuple(k_TGD.shape), k_TGD.dtype)
    if pages.bounds is None and pages.moments is None:
        filled_P = None
    elif filled_P is None:
        raise ValueError("filled: found None, allowed: scratch, since the pages have bounds or moments")
    else:
        check("filled", filled_P, (pages.k.shape[0],), torch.int32)
    launch(
        _store_kernel,
        (rows, 1, 1),
        k=k_TGD,
        v=v_TGD,
        locations=locations_T,
        k_cache=pages.k,
        v_cache=pages.v,
        filled=filled_P,
        KV_HEADS=pages.kv_heads,
        PADDED=power_of_two(pages.kv_heads),
        DIM=pages.head_dim,
        WIDTH=power_of_two(pages.head_dim),
        PAGE=pages.page_size,
    )
    if filled_P is not None:
        launch(
            _summary_kernel,
            (rows, 1, 1),
            locations=locations_T,
            k_cache=pages.k,
            bounds=pages.bounds,
            moments=pages.moments,
            filled=filled_P,
            KV_HEADS=pages.kv_heads,
            DIM=pages.head_dim,
            WIDTH=power_of_two(pages.head_dim),
            PAGE=pages.page_size,
            OFFSETS=power_of_two(pages.page_size),
        )


@triton.jit
def _store_kernel(
    k: tl.tensor,
    v: tl.tensor,
    locations: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    filled: tl.tensor,
    KV_HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    location = tl.load(locations + row)
    page, offset = location // PAGE, location % PAGE
    head, d = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    mask = (head < KV_HEADS)[:, None] & (d < DIM)[None, :]
    from_at = (row * KV_HEADS + head)[:, None] * DIM + d[None, :]
    to_at = ((page * KV_HEADS + head) * PAGE + offset)[:, None] * DIM + d[None, :]
    kind = k_cache.dtype.element_ty
    tl.store(k_cache + to_at, tl.load(k + from_at, mask=mask, other=0.0).to(tl.float32).to(kind), mask=mask)
    tl.store(v_cache + to_at, tl.load(v + from_at, mask=mask, other=0.0).to(tl.float32).to(kind), mask=mask)
    if filled is not None:
        tl.atomic_max(filled + page, (offset + 1).to(tl.int32))


@triton.jit
def _summary_kernel(
    locations: tl.tensor,
    k_cache: tl.tensor,
    bounds: tl.tensor,
    moments: tl.tensor,
    filled: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    OFFSETS: tl.constexpr,
) -> None:
    """Program (row), at work if its row is the last one of a page."""
    location = tl.load(locations + tl.program_id(0))
    page = location // PAGE
    count = (location % PAGE + 1).to(tl.int32)
    if tl.load(filled + page) != count:
        return
    offset, d = tl.arange(0, OFFSETS), tl.arange(0, WIDTH)
    mask = (offset < count)[:, None] & (d < DIM)[None, :]
    for head in range(KV_HEADS):
        at = ((page * KV_HEADS + head) * PAGE + offset)[:, None] * DIM + d[None, :]
        keys = tl.load(k_cache + at, mask=mask, other=0.0).to(tl.float32)
        to_at = (page * KV_HEADS + head) * 2 * DIM + d
        if bounds is not None:
            kind = bounds.dtype.element_ty
            top = tl.max(tl.where(mask, keys, float("-inf")), 0)
            bottom = tl.min(tl.where(mask, keys, float("inf")), 0)
            tl.store(bounds + to_at, top.to(kind), mask=d < DIM)
            tl.store(bounds + to_at + DIM, bottom.to(kind), mask=d < DIM)
        if moments is not None:
            mean = tl.sum(keys, 0) / count
            off = tl.where(mask, keys - mean[None, :], 0.0)
            tl.store(moments + to_at, mean, mask=d < DIM)
            tl.store(moments + to_at + DIM, tl.sum(off * off, 0) / count, mask=d < DIM)
    # Other rows of the page find their own count neither before nor after this. But every thread of this program must
    # have found its count before it is gone.
    tl.debug_barrier()
    tl.store(filled + page, 0)
