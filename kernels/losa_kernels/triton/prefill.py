"""Block-causal attention of stored rows to their requests' pages, in parts along the keys.

One program per (tile of rows, KV head, split). The query heads of a group and the rows of several blocks are folded
into the rows of one tile; each sees the keys up to the end of its own block, and what a neighbour sees beyond that adds
nothing to it. So a row's result depends on its pages, its position, the size of tiles and `chunk`, and not on where a
prompt is cut.
R rows, T tiles, B block length, H query heads, G KV heads, D head dim, C splits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Pages, Parts, check
from losa_kernels.triton.prefix import CHUNK, MAX_KEYS, pipeline_stages, tile_rows
from losa_kernels.triton.states import PRECISION, store_vectors

KEYS = 64  # keys of a step of the loop

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class StoredRows(NamedTuple):
    """Consecutive rows of one request. first: the first one's place in the batch; position: its position; table: where
    the request's page table begins among all."""

    first: int
    rows: int
    position: int
    table: int


class Tiles(NamedTuple):
    """Rows of requests, cut into tiles.

    tile_T5: int64, the numbers of StoredRows and the tile's number among those of its request. table: int64, the page
    tables one after another. size: rows of a tile with folded heads. longest: bound on the keys that any row sees.
    """

    tile_T5: Tensor
    table: Tensor
    size: int
    longest: int


def tile_numbers(requests: Iterable[StoredRows], share: int, size: int) -> list[tuple[int, ...]]:
    """What goes into `Tiles.tile_T5`. share: query heads per KV head."""
    return [(*mine, tile) for mine in requests for tile in range(-(-mine.rows * share // size))]


def attend_stored(
    q_RHD: Tensor, tiles: Tiles, pages: Pages, scale: float, block_length: int, chunk: int = CHUNK
) -> Parts:
    """Attention of each row to its request's stored keys up to the end of its block. Raises ValueError.

    chunk: keys per split, a multiple of MAX_KEYS.
    """
    rows, heads, _ = check("q", q_RHD, (None, None, pages.head_dim), *FLOATS).shape
    check("tiles", tiles.tile_T5, (None, 5), torch.int64)
    check("table", tiles.table, (None,), torch.int64)
    share, rest = divmod(heads, pages.kv_heads)
    if rest or not share:
        raise ValueError(f"q: found {heads} heads, allowed: multiples of {pages.kv_heads}")
    if chunk <= 0 or chunk % MAX_KEYS:
        raise ValueError(f"chunk: found {chunk}, allowed: multiples of {MAX_KEYS}")
    if tiles.size != tile_rows(tiles.size, pages.head_dim):
        raise ValueError(f"tile size: found {tiles.size}, allowed: powers of two from 16 that fit a head dim")
    splits = max(1, -(-tiles.longest // chunk))
    out = torch.empty(splits, rows, heads, pages.head_dim, dtype=torch.float32, device=q_RHD.device)
    lse = torch.empty(splits, rows, heads, dtype=torch.float32, device=q_RHD.device)
    launch(
        _prefill_kernel,
        (tiles.tile_T5.shape[0], pages.kv_heads, splits),
        warps=8 if tiles.size * pages.head_dim >= 64 * 128 else 4,
        stages=pipeline_stages(KEYS, pages.head_dim, pages.k.itemsize),
        q=q_RHD,
        tiles=tiles.tile_T5,
        k_cache=pages.k,
        v_cache=pages.v,
        table=tiles.table,
        out=out,
        lse=lse,
        room=rows,
        chunk=chunk,
        scale=scale,
        BLOCK=block_length,
        KV_HEADS=pages.kv_heads,
        SHARE=share,
        DIM=pages.head_dim,
        WIDTH=max(16, power_of_two(pages.head_dim)),
        PAGE=pages.page_size,
        ROWS=tiles.size,
        KEYS=KEYS,
    )
    return Parts(out, lse)


@triton.jit(do_not_specialize=["room", "chunk"])
def _prefill_kernel(
    q: tl.tensor,
    tiles: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    room: tl.tensor,
    chunk: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Program (tile, KV head, split)."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    mine = tiles + tl.program_id(0) * 5
    first, count = tl.load(mine), tl.load(mine + 1).to(tl.int32)
    position, my_table = tl.load(mine + 2).to(tl.int32), table + tl.load(mine + 3)
    folded = tl.load(mine + 4).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    row = folded // SHARE
    real = row < count
    seen_by = ((position + tl.minimum(row, count - 1)) // BLOCK + 1) * BLOCK  # keys: to the end of the row's own block
    vector = (first + row) * (KV_HEADS * SHARE) + kv_head * SHARE + folded % SHARE
    d = tl.arange(0, WIDTH)
    q_mask = real[:, None] & (d < DIM)[None, :]
    q_tile = tl.load(q + vector[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    end = tl.max(seen_by, 0)
    for start in range(split * chunk, tl.minimum(end, split * chunk + chunk), KEYS):
        key = start + tl.arange(0, KEYS)
        page = tl.load(my_table + key // PAGE, mask=key < end, other=0)
        at = ((page * KV_HEADS + kv_head) * PAGE + key % PAGE)[:, None] * DIM + d[None, :]
        mask = (key < end)[:, None] & (d < DIM)[None, :]
        k_tile = tl.load(k_cache + at, mask=mask, other=0.0).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(key[None, :] < seen_by[:, None], scores, float("-inf"))
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
    to = (split.to(tl.int64) * room) * (KV_HEADS * SHARE) + vector
    store_vectors(out, to, acc, real & (empty == 0), DIM, WIDTH)
    tl.store(lse + to, tl.where(empty, float("-inf"), natural), mask=real)
