"""A mixture of experts: (token, place) pairs sorted by expert, in tiles of one expert's pairs.

Tiles are as high as an expert has tokens on average, so that few tokens waste little and many read the weights seldom.
How many tiles there are is known on the device only; the grid has room for the most there can be.
T tokens, K experts per token, N = T * K pairs, C hidden, E experts, I hidden of an expert, J = 2 I, M tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, check
from losa_kernels.triton.states import PRECISION

LEAST_ROWS, MOST_ROWS = 16, 64  # pairs of a tile; a matrix unit takes no fewer
COLUMNS, DEPTH = 64, 64  # of a program's result, and of the products that it adds at a time


class Tiling(NamedTuple):
    """Pairs in the order of their experts. order: int64 [N], which pair; ends: int64 [E], behind each expert's pairs;
    expert: int64 [M], each tile's, E = the tile is not needed; first: int64 [M], its first pair. rows: pairs of a
    tile."""

    order: Tensor
    ends: Tensor
    expert: Tensor
    first: Tensor
    rows: int


def mix_experts(
    x_TC: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    gate_up_EJC: Tensor,
    down_ECI: Tensor,
    same_bits: bool = False,
) -> Tensor:
    """As the reference's: [T, C] in x's dtype. Experts are trusted to be there, since checking them means waiting.

    same_bits: a row's bits do not depend on how many others there are. Raises ValueError.
    """
    check("gate_up", gate_up_EJC, (None, None, None), *FLOATS)
    count, both, hidden = gate_up_EJC.shape
    check("down", down_ECI, (count, hidden, both // 2), gate_up_EJC.dtype)
    check("x", x_TC, (None, hidden), gate_up_EJC.dtype)
    check("chosen", chosen_TK, (x_TC.shape[0], None), torch.int64)
    check("weight", weight_TK, tuple(chosen_TK.shape), torch.float32)
    tokens, per_token = chosen_TK.shape
    if tokens == 0:
        return torch.empty_like(x_TC)
    pairs, width = tokens * per_token, both // 2
    rows = LEAST_ROWS if same_bits else min(MOST_ROWS, max(LEAST_ROWS, power_of_two(pairs // count)))
    tiling = _tiling(chosen_TK, count, rows)
    inner_NI = torch.empty(pairs, width, dtype=x_TC.dtype, device=x_TC.device)
    mixed_NC = torch.empty(pairs, hidden, dtype=torch.float32, device=x_TC.device)
    tiles = tiling.expert.shape[0]
    shared: dict[str, Any] = dict(zip(("order", "ends", "expert", "first"), tiling, strict=False))
    sizes: dict[str, Any] = {"EXPERTS": count, "HIDDEN": hidden, "INNER": width}
    sizes |= {"ROWS": rows, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    launch(
        _gate_kernel,
        (tiles, -(-width // COLUMNS), 1),
        x=x_TC,
        weights=gate_up_EJC,
        out=inner_NI,
        **shared,
        **sizes,
        PER_TOKEN=per_token,
    )
    launch(
        _down_kernel,
        (tiles, -(-hidden // COLUMNS), 1),
        x=inner_NI,
        weights=down_ECI,
        factors=weight_TK,
        out=mixed_NC,
        **shared,
        **sizes,
    )
    return mixed_NC.view(tokens, per_token, hidden).sum(1).to(x_TC.dtype)


def _tiling(chosen_TK: Tensor, count: int, rows: int) -> Tiling:
    expert_N, order_N = chosen_TK.flatten().sort(stable=True)
    each = torch.arange(count, device=chosen_TK.device)
    starts = torch.searchsorted(expert_N, each)
    ends = torch.searchsorted(expert_N, each, right=True)
    tile_ends = ((ends - starts + rows - 1) // rows).cumsum(0)
    pairs = expert_N.shape[0]
    tile_M = torch.arange(min(pairs, count) + pairs // rows, device=chosen_TK.device)
    expert_M = torch.searchsorted(tile_ends, tile_M, right=True)
    mine_M = expert_M.clamp(max=count - 1)
    before_M = torch.where(mine_M > 0, tile_ends[(mine_M - 1).clamp(min=0)], 0)
    return Tiling(order_N, ends, expert_M, starts[mine_M] + (tile_M - before_M) * rows, rows)


@triton.jit
def _gate_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    ends: tl.tensor,
    expert: tl.tensor,
    first: tl.tensor,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
) -> None:
    """Program (tile, columns of the hidden layer): silu(gate) * up of the tile's pairs, in the order of experts."""
    own = tl.load(expert + tl.program_id(0))
    if own >= EXPERTS:
        return
    place = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    real = place < tl.load(ends + own)
    token = tl.load(order + place, mask=real, other=0) // PER_TOKEN
    column, depth = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    wanted = column < INNER
    gate_at = weights + (own * 2 * INNER + column)[:, None] * HIDDEN
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, HIDDEN, DEPTH):
        inside = (at + depth < HIDDEN)[None, :]
        rows = tl.load(x + token[:, None] * HIDDEN + at + depth[None, :], mask=real[:, None] & inside, other=0.0)
        mask = wanted[:, None] & inside
        gate_tile = tl.load(gate_at + at + depth[None, :], mask=mask, other=0.0)
        up_tile = tl.load(gate_at + INNER * HIDDEN + at + depth[None, :], mask=mask, other=0.0)
        gate = tl.dot(rows, tl.trans(gate_tile), gate, input_precision=PRECISION)
        up = tl.dot(rows, tl.trans(up_tile), up, input_precision=PRECISION)
    mixed = gate / (1.0 + tl.exp(-gate)) * up
    to_at = place[:, None] * INNER + column[None, :]
    tl.store(out + to_at, mixed.to(out.dtype.element_ty), mask=real[:, None] & wanted[None, :])


@triton.jit
def _down_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    ends: tl.tensor,
    expert: tl.tensor,
    first: tl.tensor,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Program (tile, columns of the result): weighted results of the tile's pairs, each to its pair's place."""
    own = tl.load(expert + tl.program_id(0))
    if own >= EXPERTS:
        return
    place = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    real = place < tl.load(ends + own)
    pair = tl.load(order + place, mask=real, other=0)
    column, depth = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    wanted = column < HIDDEN
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, INNER, DEPTH):
        inside = (at + depth < INNER)[None, :]
        rows = tl.load(x + place[:, None] * INNER + at + depth[None, :], mask=real[:, None] & inside, other=0.0)
        weight_at = weights + (own * HIDDEN + column)[:, None] * INNER + at + depth[None, :]
        tile = tl.load(weight_at, mask=wanted[:, None] & inside, other=0.0)
        total = tl.dot(rows, tl.trans(tile), total, input_precision=PRECISION)
    factor = tl.load(factors + pair, mask=real, other=0.0)
    to_at = pair[:, None] * HIDDEN + column[None, :]
    tl.store(out + to_at, total * factor[:, None], mask=real[:, None] & wanted[None, :])
