"""Attention of each block to itself, merged with what its rows know of their prefixes: the end of every layer.

One program per (segment, KV head, tile of rows with folded heads). For a planned row it merges the parts just computed
and remembers the result; for any other it takes what was remembered; both are merged with the attention inside the
block, which never leaves the processor.
S segments, B block length, R = S * B rows, n planned rows, H query heads, G KV heads, D head dim, C splits, X places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Parts, Planned, Segments, check
from losa_kernels.triton.states import PRECISION, load_vectors, merged, merged_parts, store_vectors

TILE_ROWS = 16  # the smallest that a matrix product takes: several vectors per row are held at once
MAX_TILE = 32 * 1024  # bytes of the keys of a block: as many of its values lie beside them

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Kept(NamedTuple):
    """Remembered prefix states of one layer: out [X, H, D], lse float32 [X, H]; row r has place[r], int64 [R]."""

    out: Tensor
    lse: Tensor
    place: Tensor


class Fresh(NamedTuple):
    """Newly computed parts of the planned rows. heads: bool [n, H], those that replace what is kept (None: all)."""

    parts: Parts
    planned: Planned
    heads: Tensor | None = None


def attend_block(q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, block_length: int, scale: float) -> tuple[Tensor, Tensor]:
    """Bidirectional attention of each block to itself: float32 out [R, H, D] and natural lse [R, H]."""
    out = torch.empty_like(q_RHD, dtype=torch.float32)
    lse = torch.empty(q_RHD.shape[:2], dtype=torch.float32, device=q_RHD.device)
    _launch(q_RHD, k_RGD, v_RGD, block_length, scale, out, lse, None, None)
    return out, lse


def finish_block(
    q_RHD: Tensor,
    k_RGD: Tensor,
    v_RGD: Tensor,
    block_length: int,
    scale: float,
    kept: Kept | None,
    fresh: Fresh | None = None,
) -> Tensor:
    """Attention of each row to its prefix and its block: out [R, H, D] in the dtype of q. Raises ValueError.

    The prefix state of a row is that of its parts, if it is planned in `fresh`, which then becomes the kept one, and
    the kept one otherwise. Without kept states a row that is not planned has no prefix.
    """
    out = torch.empty_like(q_RHD)
    _launch(q_RHD, k_RGD, v_RGD, block_length, scale, out, None, kept, fresh)
    return out


def fits(block_length: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a block of that length is not too large for a processor."""
    return power_of_two(block_length) * power_of_two(head_dim) * dtype.itemsize <= MAX_TILE


def own_places(segments: Segments) -> Tensor:
    """The places of rows whose kept state lies in their own order: int64 [R]."""
    return torch.arange(segments.rows, device=segments.table.device)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_length: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    kept: Kept | None,
    fresh: Fresh | None,
) -> None:
    rows, heads, dim = check("q", q, (None, None, None), *FLOATS).shape
    kv_heads = check("k", k, (rows, None, dim), *FLOATS).shape[1]
    check("v", v, tuple(k.shape), k.dtype)
    share, rest = divmod(heads, kv_heads)
    if rest or rows % block_length:
        raise ValueError(f"q: found {rows} rows, {heads} heads, allowed: multiples of {block_length}, {kv_heads}")
    if kept is not None:
        check("kept out", kept.out, (None, heads, dim), *FLOATS)
        check("kept lse", kept.lse, tuple(kept.out.shape[:2]), torch.float32)
        check("place", kept.place, (rows,), torch.int64)
    splits = room = 0
    if fresh is not None:
        splits, room = check("parts", fresh.parts.out, (None, None, heads, dim), torch.float32).shape[:2]
        check("order", fresh.planned.order, (rows,), torch.int64)
        if fresh.heads is not None:
            check("heads", fresh.heads, (room, heads), torch.bool)
    launch(
        _block_kernel,
        (rows // block_length, kv_heads, -(-block_length * share // TILE_ROWS)),
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        kept_out=None if kept is None else kept.out,
        kept_lse=None if kept is None else kept.lse,
        kept_place=None if kept is None else kept.place,
        parts_out=None if fresh is None else fresh.parts.out,
        parts_lse=None if fresh is None else fresh.parts.lse,
        order=None if fresh is None else fresh.planned.order,
        fresh_heads=None if fresh is None or fresh.heads is None else fresh.heads.view(torch.uint8),
        splits=splits,
        room=room,
        scale=scale,
        BLOCK=block_length,
        KV_HEADS=kv_heads,
        SHARE=share,
        DIM=dim,
        WIDTH=max(16, power_of_two(dim)),
        ROWS=TILE_ROWS,
        KEYS=max(16, power_of_two(block_length)),
    )


@triton.jit(do_not_specialize=["splits", "room"])
def _block_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    kept_out: tl.tensor,
    kept_lse: tl.tensor,
    kept_place: tl.tensor,
    parts_out: tl.tensor,
    parts_lse: tl.tensor,
    order: tl.tensor,
    fresh_heads: tl.tensor,
    splits: tl.tensor,
    room: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Program (segment, KV head, tile)."""
    HEADS: tl.constexpr = KV_HEADS * SHARE
    first = tl.program_id(0).to(tl.int64) * BLOCK
    folded = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = folded < BLOCK * SHARE
    row = first + folded // SHARE
    head = tl.program_id(1) * SHARE + folded % SHARE
    vector = row * HEADS + head
    state, log_sum = _inside(q, k, v, vector, real, first, scale, BLOCK, KV_HEADS, DIM, WIDTH, ROWS, KEYS)
    if lse is not None:
        tl.store(lse + vector, log_sum, mask=real)
    fresh = real & False
    if parts_out is not None:
        planned = tl.load(order + row, mask=real, other=-1)
        fresh = real & (planned >= 0)
        if fresh_heads is not None:
            fresh = fresh & (tl.load(fresh_heads + planned * HEADS + head, mask=fresh, other=0) != 0)
        prefix, prefix_lse = merged_parts(
            parts_out, parts_lse, planned * HEADS + head, fresh, splits, room.to(tl.int64) * HEADS, DIM, WIDTH
        )
    if kept_out is not None:
        kept_vector = tl.load(kept_place + row, mask=real, other=0) * HEADS + head
        old_lse = tl.load(kept_lse + kept_vector, mask=real & (fresh == 0), other=float("-inf"))
        old = load_vectors(kept_out, kept_vector, old_lse > float("-inf"), DIM, WIDTH)
        if parts_out is not None:
            store_vectors(kept_out, kept_vector, prefix, fresh, DIM, WIDTH)
            tl.store(kept_lse + kept_vector, prefix_lse, mask=fresh)
            prefix += old
            prefix_lse = tl.where(fresh, prefix_lse, old_lse)
        else:
            prefix, prefix_lse = old, old_lse
    if kept_out is not None or parts_out is not None:
        state, log_sum = merged(prefix, prefix_lse, state, log_sum)
    store_vectors(out, vector, state, real, DIM, WIDTH)


@triton.jit
def _inside(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    vector: tl.tensor,
    real: tl.tensor,
    first: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Attention of these query vectors to the B keys of a block of rows: [ROWS, WIDTH] and natural [ROWS]."""
    d = tl.arange(0, WIDTH)
    key = tl.arange(0, KEYS)
    q_mask = real[:, None] & (d < DIM)[None, :]
    q_tile = tl.load(q + vector[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
    at = ((first + key) * KV_HEADS + tl.program_id(1))[:, None] * DIM + d[None, :]
    mask = (key < BLOCK)[:, None] & (d < DIM)[None, :]
    k_tile = tl.load(k + at, mask=mask, other=0.0).to(q_tile.dtype)
    v_tile = tl.load(v + at, mask=mask, other=0.0).to(q_tile.dtype)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
    scores = tl.where((key < BLOCK)[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - top[:, None])
    total = tl.sum(weights, 1)
    state = tl.dot(weights.to(q_tile.dtype), v_tile, input_precision=PRECISION) / total[:, None]
    return state, (top + tl.log2(total)) * LN2
