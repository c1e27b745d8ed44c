"""Softmax mass of prefix granules per query head, over all rows of a block: what sets fixed by exact attention need.

One program per (segment, KV head and tile of its query heads, tile of granules). A tile of keys holds whole granules,
each padded to a power of two, or, where a granule is large, a stretch of one.
S segments, B block length, R = S * B rows, H query heads, G KV heads, D head dim, n granules.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import Pages, Segments, check, check_query
from losa_kernels.triton.states import PRECISION

TILE_ROWS = 64  # at most, unless a single head has more
TILE_KEYS = 64


def prefix_mass(
    q_RHD: Tensor,
    lse_RH: Tensor,
    pages: Pages,
    segments: Segments,
    scale: float,
    granule: int = 1,
    over_rows: Literal["mean", "max"] = "mean",
) -> Tensor:
    """exp(scale q . k - lse), summed over the keys of a granule, then mean or maximum over the rows of a segment:
    float32 [S, H, n], 0 behind a segment's last granule. Raises ValueError.

    lse_RH: natural; -inf gives no mass. n: granules of the longest prefix.
    """
    share = check_query(q_RHD, pages, segments)
    heads, dim = q_RHD.shape[1:]
    check("lse", lse_RH, (segments.rows, heads), torch.float32)
    if granule < 1:
        raise ValueError(f"granule: found {granule}, allowed: at least 1")
    width = -(-segments.longest // granule)
    mass = torch.empty(segments.count, heads, width, dtype=torch.float32, device=q_RHD.device)
    rows = power_of_two(segments.block_length)
    tile_heads = min(power_of_two(share), max(-(-16 // rows), TILE_ROWS // rows, 1))
    tile_heads = max(tile_heads, -(-16 // rows))
    stretch = min(TILE_KEYS, power_of_two(granule))
    granules = TILE_KEYS // stretch
    head_tiles = -(-share // tile_heads)
    launch(
        _mass_kernel,
        (segments.count, pages.kv_heads * head_tiles, -(-width // granules)),
        warps=8 if tile_heads * rows > 64 else 4,
        q=q_RHD,
        lse=lse_RH,
        k_cache=pages.k,
        table_indptr=segments.table_indptr,
        table=segments.table,
        prefix_lens=segments.prefix_lens,
        mass=mass,
        width=width,
        scale=scale,
        BLOCK=segments.block_length,
        KV_HEADS=pages.kv_heads,
        SHARE=share,
        DIM=dim,
        WIDTH=max(16, power_of_two(dim)),
        PAGE=pages.page_size,
        GRANULE=granule,
        ROWS=rows,
        TILE_HEADS=tile_heads,
        HEAD_TILES=head_tiles,
        GRANULES=granules,
        STRETCH=stretch,
        MEAN=over_rows == "mean",
    )
    return mass


@triton.jit(do_not_specialize=["width"])
def _mass_kernel(
    q: tl.tensor,
    lse: tl.tensor,
    k_cache: tl.tensor,
    table_indptr: tl.tensor,
    table: tl.tensor,
    prefix_lens: tl.tensor,
    mass: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    GRANULE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    GRANULES: tl.constexpr,
    STRETCH: tl.constexpr,
    MEAN: tl.constexpr,
) -> None:
    """Program (segment, KV head * HEAD_TILES + tile of heads, tile of granules)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    segment = tl.program_id(0).to(tl.int64)
    kv_head, head_tile = tl.program_id(1) // HEAD_TILES, tl.program_id(1) % HEAD_TILES
    # Folded rows: all rows of the first head, padded to a power of two, then those of the next.
    folded = tl.arange(0, TILE_HEADS * ROWS)
    in_group, in_block = head_tile * TILE_HEADS + folded // ROWS, folded % ROWS
    real = (in_group < SHARE) & (in_block < BLOCK)
    vector = (segment * BLOCK + in_block) * (KV_HEADS * SHARE) + kv_head * SHARE + in_group
    d = tl.arange(0, WIDTH)
    q_mask = real[:, None] & (d < DIM)[None, :]
    q_tile = tl.load(q + vector[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
    level = tl.load(lse + vector, mask=real, other=float("-inf"))
    level = tl.where(level == float("-inf"), float("inf"), level) * LOG2E

    prefix_len = tl.load(prefix_lens + segment).to(tl.int32)
    my_table = table + tl.load(table_indptr + segment)
    slot = tl.arange(0, GRANULES * STRETCH)
    granule = tl.program_id(2) * GRANULES + slot // STRETCH
    found = tl.zeros((TILE_HEADS * ROWS, GRANULES), tl.float32)
    for start in range(0, GRANULE, STRETCH):
        inside = start + slot % STRETCH
        position = granule * GRANULE + inside
        seen = (inside < GRANULE) & (position < prefix_len)
        page = tl.load(my_table + position // PAGE, mask=seen, other=0)
        key = (page * KV_HEADS + kv_head) * PAGE + position % PAGE
        mask = seen[:, None] & (d < DIM)[None, :]
        k_tile = tl.load(k_cache + key[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.where(seen[None, :], tl.exp2(scores - level[:, None]), 0.0)
        found += tl.sum(tl.reshape(weights, (TILE_HEADS * ROWS, GRANULES, STRETCH)), 2)

    by_head = tl.reshape(tl.where(real[:, None], found, 0.0), (TILE_HEADS, ROWS, GRANULES))
    result = tl.sum(by_head, 1) / BLOCK if MEAN else tl.max(by_head, 1)
    head_in_group = head_tile * TILE_HEADS + tl.arange(0, TILE_HEADS)
    out_granule = tl.program_id(2) * GRANULES + tl.arange(0, GRANULES)
    at = (segment * (KV_HEADS * SHARE) + kv_head * SHARE + head_in_group)[:, None] * width + out_granule[None, :]
    tl.store(mass + at, result, mask=(head_in_group < SHARE)[:, None] & (out_granule < width)[None, :])
