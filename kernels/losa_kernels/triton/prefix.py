"""Attention of planned rows to what lists name of their prefixes, or to whole prefixes, in parts along the keys.

One program per (owner of lists and tile of its rows, list head, split): query heads that share a list and the rows of
the owner are folded into the rows of one tile, and a split is a stretch of `chunk` keys of the list. So a row's result
depends on its list, its length and `chunk` alone. Each program reads on the device how long its list is.
S segments, n planned rows, H query heads, G KV heads, D head dim, C splits, P pages of a prefix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import Lists, Pages, Parts, Planned, Segments, check, check_planned, check_query
from losa_kernels.triton.states import PRECISION, store_vectors

CHUNK = 1024  # keys of a split where results must not depend on the batch
KEYS = 32  # keys of a step of the loop: small tiles, so that two programs fit on every kind of processor
MAX_KEYS = 128  # divides every chunk
PROGRAMS_PER_PROCESSOR = 2
MAX_TILE_ROWS, MAX_TILE = 128, 128 * 128  # rows of a tile, and numbers of its output
MAX_PIPELINE = 96 * 1024  # bytes of K and V on their way

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def attend_prefix(
    q_RHD: Tensor,
    planned: Planned,
    pages: Pages,
    segments: Segments,
    scale: float,
    lists: Lists | None = None,
    chunk: int = CHUNK,
    peaks: Tensor | None = None,
) -> Parts:
    """Attention of the planned rows to what `lists` name (None: their whole prefixes). Raises ValueError.

    chunk: keys per split, a multiple of MAX_KEYS; results depend on it in rounding. peaks: float32 [n, H, P], becomes
    each row's largest scaled score per page where it reads its whole prefix and -inf elsewhere.
    """
    check_query(q_RHD, pages, segments)
    check_planned(planned, segments)
    heads, dim = q_RHD.shape[1:]
    list_heads = pages.kv_heads if lists is None else lists.heads
    share = heads // list_heads
    per_row = lists is not None and lists.per_row
    most = segments.longest if lists is None else lists.most
    if chunk <= 0 or chunk % MAX_KEYS:
        raise ValueError(f"chunk: found {chunk}, allowed: multiples of {MAX_KEYS}")
    splits = max(1, -(-most // chunk))
    out = torch.empty(splits, planned.room, heads, dim, dtype=torch.float32, device=q_RHD.device)
    lse = torch.empty(splits, planned.room, heads, dtype=torch.float32, device=q_RHD.device)
    if peaks is not None:
        _begin_peaks(peaks, segments, planned, heads, pages.page_size)
    if lists is not None:
        _check_lists(lists, planned, segments, pages, heads)
    folded = share if per_row else segments.block_length * share
    rows = tile_rows(folded, dim)
    tiles = -(-folded // rows)
    owners = planned.room if per_row else segments.count
    keys = KEYS if peaks is None else max(KEYS, pages.page_size)
    launch(
        _prefix_kernel,
        (owners * tiles, list_heads, splits),
        warps=8 if rows * dim > 64 * 128 else 4,
        stages=pipeline_stages(keys, dim, pages.k.itemsize),
        q=q_RHD,
        rows=planned.rows,
        row_indptr=planned.indptr,
        k_cache=pages.k,
        v_cache=pages.v,
        table_indptr=segments.table_indptr,
        table=segments.table,
        prefix_lens=segments.prefix_lens,
        list_indptr=None if lists is None else lists.indptr,
        indices=None if lists is None else lists.indices,
        whole=None if lists is None else lists.whole.view(torch.uint8),
        out=out,
        lse=lse,
        peaks=peaks,
        segments=segments.count,
        room=planned.room,
        chunk=chunk,
        peak_width=0 if peaks is None else peaks.shape[2],
        scale=scale,
        BLOCK=segments.block_length,
        KV_HEADS=pages.kv_heads,
        LIST_HEADS=list_heads,
        SHARE=share,
        DIM=dim,
        WIDTH=max(16, power_of_two(dim)),
        PAGE=pages.page_size,
        GRANULE=1 if lists is None else lists.granule,
        ROWS=rows,
        KEYS=keys,
        TILES=tiles,
        PER_ROW=per_row,
    )
    return Parts(out, lse)


def tile_rows(folded: int, dim: int) -> int:
    """Rows of a tile for that many rows with folded heads: at least what a matrix product takes."""
    most = min(MAX_TILE_ROWS, MAX_TILE // power_of_two(dim))
    return min(most, max(16, power_of_two(folded)))


def pipeline_stages(keys: int, dim: int, itemsize: int) -> int:
    """Depth of the pipeline of tiles of K and V with that many keys: at most 3, less where the tiles are large."""
    return max(1, min(3, MAX_PIPELINE // (2 * keys * power_of_two(dim) * itemsize)))


def holds_peaks(page_size: int, dim: int, itemsize: int) -> bool:
    """Whether whole pages can be steps of the loop, as peaks need them."""
    return MAX_KEYS % page_size == 0 and 2 * page_size * power_of_two(dim) * itemsize <= MAX_PIPELINE


def filling_chunk(programs: int, most: int, processors: int) -> int:
    """A chunk that gives every processor of the device something to do, where rounding may depend on the batch.

    programs: those of one split. most: keys of the longest list.
    """
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors // max(1, programs))
    return max(1, -(-most // (wanted * MAX_KEYS))) * MAX_KEYS


def _begin_peaks(peaks: Tensor, segments: Segments, planned: Planned, heads: int, page_size: int) -> None:
    check("peaks", peaks, (planned.room, heads, None), torch.float32)
    if MAX_KEYS % page_size:
        raise ValueError(f"peaks: found page size {page_size}, allowed: divisors of {MAX_KEYS}")
    if peaks.shape[2] * page_size < segments.longest:
        raise ValueError(f"peaks: found room for {peaks.shape[2]} pages, allowed: all of {segments.longest} tokens")
    peaks.fill_(-torch.inf)


def _check_lists(lists: Lists, planned: Planned, segments: Segments, pages: Pages, heads: int) -> None:
    if lists.heads not in (pages.kv_heads, heads):
        raise ValueError(f"heads of lists: found {lists.heads}, allowed: {pages.kv_heads}, {heads}")
    if lists.granule < 1:
        raise ValueError(f"granule: found {lists.granule}, allowed: at least 1")
    owners = planned.room if lists.per_row else segments.count
    check("indptr of lists", lists.indptr, (owners * lists.heads + 1,), torch.int64)
    check("indices", lists.indices, (None,), torch.int64)
    check("whole", lists.whole, (segments.count,), torch.bool)


@triton.jit(do_not_specialize=["segments", "room", "chunk", "peak_width"])
def _prefix_kernel(
    q: tl.tensor,
    rows: tl.tensor,
    row_indptr: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table_indptr: tl.tensor,
    table: tl.tensor,
    prefix_lens: tl.tensor,
    list_indptr: tl.tensor,
    indices: tl.tensor,
    whole: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    peaks: tl.tensor,
    segments: tl.tensor,
    room: tl.tensor,
    chunk: tl.tensor,
    peak_width: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    GRANULE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    PER_ROW: tl.constexpr,
) -> None:
    """Program (owner * TILES + tile, list head, split)."""
    owner, list_head, split = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    segment, first, count = _owned(owner, rows, row_indptr, segments, BLOCK, PER_ROW)
    folded = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    if (tl.program_id(0) % TILES) * ROWS >= count * SHARE:
        return
    real = folded < count * SHARE
    place = first + folded // SHARE
    head = list_head * SHARE + folded % SHARE
    d = tl.arange(0, WIDTH)
    row = tl.load(rows + place, mask=real, other=0)
    q_at = (row * (LIST_HEADS * SHARE) + head)[:, None] * DIM + d[None, :]
    q_tile = tl.load(q + q_at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)

    prefix_len = tl.load(prefix_lens + segment).to(tl.int32)
    length = prefix_len
    everything = prefix_len >= 0
    if list_indptr is not None:
        everything = tl.load(whole + segment) != 0
        begin = tl.load(list_indptr + owner * LIST_HEADS + list_head)
        listed = (tl.load(list_indptr + owner * LIST_HEADS + list_head + 1) - begin).to(tl.int32) * GRANULE
        length = tl.where(everything, prefix_len, listed)
    kv_head = list_head * KV_HEADS // LIST_HEADS
    my_table = table + tl.load(table_indptr + segment)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(split * chunk, tl.minimum(length, split * chunk + chunk), KEYS):
        slot = start + tl.arange(0, KEYS)
        position = slot
        if list_indptr is not None:
            mine = (slot < length) & (everything == 0)
            number = tl.load(indices + begin + slot // GRANULE, mask=mine, other=0).to(tl.int32)
            position = tl.where(everything, slot, number * GRANULE + slot % GRANULE)
        seen = (slot < length) & (position < prefix_len)
        page = tl.load(my_table + position // PAGE, mask=seen, other=0)
        vector = (page * KV_HEADS + kv_head) * PAGE + position % PAGE
        at = vector[:, None] * DIM + d[None, :]
        mask = seen[:, None] & (d < DIM)[None, :]
        k_tile = tl.load(k_cache + at, mask=mask, other=0.0).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        if peaks is not None:
            _store_peaks(
                peaks, scores, place * (LIST_HEADS * SHARE) + head, real & everything, start, length, peak_width,
                ROWS, KEYS, PAGE,
            )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tl.load(v_cache + at, mask=mask, other=0.0).to(q_tile.dtype)
        acc = acc * shrink[:, None] + tl.dot(weights.to(q_tile.dtype), v_tile, input_precision=PRECISION)
        top = higher

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    natural = (top + tl.log2(tl.where(empty, 1.0, total))) * LN2
    vector = (split.to(tl.int64) * room + place) * (LIST_HEADS * SHARE) + head
    store_vectors(out, vector, acc, real & (empty == 0), DIM, WIDTH)
    tl.store(lse + vector, tl.where(empty, float("-inf"), natural), mask=real)


@triton.jit
def _owned(
    owner: tl.tensor,
    rows: tl.tensor,
    row_indptr: tl.tensor,
    segments: tl.tensor,
    BLOCK: tl.constexpr,
    PER_ROW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Segment, first planned row and number of planned rows of an owner of lists."""
    if PER_ROW:
        count = (owner < tl.load(row_indptr + segments)).to(tl.int64)
        segment = tl.load(rows + owner, mask=count > 0, other=0) // BLOCK
        first = owner.to(tl.int64)
    else:
        segment = owner.to(tl.int64)
        first = tl.load(row_indptr + owner)
        count = tl.load(row_indptr + owner + 1) - first
    return segment, first, count


@triton.jit
def _store_peaks(
    peaks: tl.tensor,
    scores: tl.tensor,
    vector: tl.tensor,
    real: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Largest of the base-2 scores of each page, as natural scores."""
    best = tl.max(tl.reshape(scores, (ROWS, KEYS // PAGE, PAGE)), 2) * LN2
    page = start // PAGE + tl.arange(0, KEYS // PAGE)
    mask = real[:, None] & (page * PAGE < length)[None, :]
    tl.store(peaks + vector[:, None] * width + page[None, :], best, mask=mask)
