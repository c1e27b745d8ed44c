"""Upper bounds of q . k per page, from the pages' bounds: what planned rows choose pages by.

max(q m, q M) per channel is q+ M + q- m, so the bounds are two matrix products that read a page's summary once for all
rows and heads. Query heads that share a list are brought to one score before anything is written.
S segments, n planned rows, H query heads, G KV heads, E lists per row (G, or H where none share), D head dim, P pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.reference.selection import Share
from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import Pages, Planned, Segments, check, check_planned, check_query
from losa_kernels.triton.states import PRECISION

TILE_ROWS = 32  # at most, with folded heads, unless the heads of one row are more
TILE_PAGES = 32


def page_scores(
    q_RHD: Tensor,
    planned: Planned,
    pages: Pages,
    segments: Segments,
    whole_S: Tensor,
    share: Share = "max",
    heads_nH: Tensor | None = None,
) -> Tensor:
    """One score per planned row, list and page: float32 [n, E, P], -inf behind a prefix's last page.

    share: the largest or the mean score of the query heads of a KV head, or "none": each its own. heads_nH: bool, the
    heads of each row that take part (None: all); the scores of a list without any mean nothing. whole_S: bool, True =
    the rows of the segment are not scored. A bound that is no number counts as infinite: a broken page is read, so that
    its reader finds out. What lies behind the last planned row is undefined. Raises ValueError.
    """
    heads_per_kv = check_query(q_RHD, pages, segments)
    check_planned(planned, segments)
    if pages.bounds is None:
        raise ValueError("bounds: found None, allowed: the bounds of every page")
    heads, dim = q_RHD.shape[1:]
    check("whole", whole_S, (segments.count,), torch.bool)
    if heads_nH is not None:
        check("heads", heads_nH, (planned.room, heads), torch.bool)
    width = -(-segments.longest // pages.page_size)
    lists = heads if share == "none" else pages.kv_heads
    scores = torch.empty(planned.room, lists, width, dtype=torch.float32, device=q_RHD.device)
    padded = power_of_two(heads_per_kv)
    rows = min(power_of_two(segments.block_length), max(1, TILE_ROWS // padded))
    rows = max(rows, -(-16 // padded))
    tiles = -(-segments.block_length // rows)
    launch(
        _scores_kernel,
        (segments.count * tiles, pages.kv_heads, -(-width // TILE_PAGES)),
        q=q_RHD,
        rows=planned.rows,
        row_indptr=planned.indptr,
        bounds=pages.bounds,
        table_indptr=segments.table_indptr,
        table=segments.table,
        prefix_lens=segments.prefix_lens,
        whole=whole_S.view(torch.uint8),
        taking=None if heads_nH is None else heads_nH.view(torch.uint8),
        scores=scores,
        width=width,
        KV_HEADS=pages.kv_heads,
        SHARE=heads_per_kv,
        PADDED=padded,
        DIM=dim,
        WIDTH=max(16, power_of_two(dim)),
        PAGE=pages.page_size,
        ROWS=rows,
        PAGES=TILE_PAGES,
        TILES=tiles,
        KIND=share,
    )
    return scores


@triton.jit(do_not_specialize=["width"])
def _scores_kernel(
    q: tl.tensor,
    rows: tl.tensor,
    row_indptr: tl.tensor,
    bounds: tl.tensor,
    table_indptr: tl.tensor,
    table: tl.tensor,
    prefix_lens: tl.tensor,
    whole: tl.tensor,
    taking: tl.tensor,
    scores: tl.tensor,
    width: tl.tensor,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    TILES: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """Program (segment * TILES + tile, KV head, tile of pages)."""
    HEADS: tl.constexpr = KV_HEADS * SHARE
    segment, kv_head = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(1)
    first = tl.load(row_indptr + segment) + (tl.program_id(0) % TILES) * ROWS
    end = tl.load(row_indptr + segment + 1)
    if (first >= end) | (tl.load(whole + segment) != 0):
        return
    # Folded rows: all heads of the first row, padded to a power of two, then those of the next.
    folded = tl.arange(0, ROWS * PADDED)
    place, in_group = first + folded // PADDED, folded % PADDED
    real = (place < end) & (in_group < SHARE)
    row = tl.load(rows + place, mask=place < end, other=0)
    head = kv_head * SHARE + in_group
    d = tl.arange(0, WIDTH)
    q_at = (row * HEADS + head)[:, None] * DIM + d[None, :]
    q_tile = tl.load(q + q_at, mask=real[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)

    page = tl.program_id(2) * PAGES + tl.arange(0, PAGES)
    held = page * PAGE < tl.load(prefix_lens + segment)
    page_id = tl.load(table + tl.load(table_indptr + segment) + page, mask=held, other=0)
    at = ((page_id * KV_HEADS + kv_head) * 2)[:, None] * DIM + d[None, :]
    mask = held[:, None] & (d < DIM)[None, :]
    operand = q.dtype.element_ty
    top = tl.load(bounds + at, mask=mask, other=0.0).to(operand)
    bottom = tl.load(bounds + at + DIM, mask=mask, other=0.0).to(operand)
    found = tl.dot(tl.maximum(q_tile, 0.0).to(operand), tl.trans(top), input_precision=PRECISION)
    found += tl.dot(tl.minimum(q_tile, 0.0).to(operand), tl.trans(bottom), input_precision=PRECISION)
    found = tl.where(found == found, found, float("inf"))

    takes = real
    if taking is not None:
        takes = real & (tl.load(taking + place * HEADS + head, mask=real, other=0) != 0)
    inside = (page < width)[None, :]
    if KIND == "none":
        found = tl.where(held[None, :], found, float("-inf"))
        tl.store(scores + (place * HEADS + head)[:, None] * width + page[None, :], found, mask=real[:, None] & inside)
    else:
        shared = _shared(found, takes, KIND, ROWS, PADDED, PAGES)
        shared = tl.where(held[None, :], shared, float("-inf"))
        lists = (first + tl.arange(0, ROWS)) * KV_HEADS + kv_head
        there = (first + tl.arange(0, ROWS) < end)[:, None]
        tl.store(scores + lists[:, None] * width + page[None, :], shared, mask=there & inside)


@triton.jit
def _shared(
    found: tl.tensor,
    takes: tl.tensor,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PAGES: tl.constexpr,
) -> tl.tensor:
    """Maximum or mean over the heads of each row that take part: [ROWS, PAGES]."""
    if KIND == "max":
        masked = tl.where(takes[:, None], found, float("-inf"))
        return tl.max(tl.reshape(masked, (ROWS, PADDED, PAGES)), 1)
    masked = tl.where(takes[:, None], found, 0.0)
    count = tl.sum(tl.reshape(takes.to(tl.float32), (ROWS, PADDED)), 1)
    return tl.sum(tl.reshape(masked, (ROWS, PADDED, PAGES)), 1) / tl.maximum(count, 1.0)[:, None]
