"""Which rows are computed: the most changed ones of each segment, and their list, made on the device.

S segments, B block length, R = S * B rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import Planned, check

FLAGS = 2048  # of a step of the loop that counts the rows before a segment
PAIRS_PER_WARP = 2048


def active_rows(change_SYB: Tensor, count_S: Tensor, tau_S: Tensor, fresh_S: Tensor) -> Tensor:
    """The most changed rows of each segment, for each of the Y parts of a row by itself: bool [R, Y].

    A row is active if it is among the count_S[s] most changed ones, or if the rows above it hold less than the share
    tau_S[s] of the segment's change; every row of a fresh segment is. Ties go to the lowest row; a change that is no
    number is the largest. Raises ValueError.
    """
    segments, parts, length = check("change", change_SYB, (None, None, None), torch.float32).shape
    check("count", count_S, (segments,), torch.int64)
    check("tau", tau_S, (segments,), torch.float32)
    check("fresh", fresh_S, (segments,), torch.bool)
    active = torch.empty(segments * length, parts, dtype=torch.bool, device=change_SYB.device)
    launch(
        _active_kernel,
        (segments, parts, 1),
        warps=min(8, max(1, power_of_two(length) ** 2 // PAIRS_PER_WARP)),
        change=change_SYB,
        counts=count_S,
        taus=tau_S,
        fresh=fresh_S.view(torch.uint8),
        active=active.view(torch.uint8),
        BLOCK=length,
        PARTS=parts,
        ROWS=power_of_two(length),
    )
    return active


def plan_rows(active_RY: Tensor, block_length: int, most: tuple[int, ...] | None = None) -> Planned:
    """The rows of which any part is active, in order. Raises ValueError.

    most: bound on the active rows of each segment, trusted (None: the block length).
    """
    rows, parts = check("active", active_RY, (None, None), torch.bool).shape
    if rows % block_length:
        raise ValueError(f"active: found {rows} rows, allowed: multiples of the block length {block_length}")
    segments = rows // block_length
    if most is not None and len(most) != segments:
        raise ValueError(f"most: found {len(most)} bounds, allowed: one for each of the {segments} segments")
    room = rows if most is None else sum(most)
    planned, order = (torch.empty(n, dtype=torch.int64, device=active_RY.device) for n in (room, rows))
    indptr = torch.empty(segments + 1, dtype=torch.int64, device=active_RY.device)
    padded = power_of_two(parts)
    launch(
        _plan_kernel,
        (segments, 1, 1),
        warps=1 if parts == 1 else 4,
        active=active_RY.view(torch.uint8),
        rows=planned,
        indptr=indptr,
        order=order,
        BLOCK=block_length,
        PARTS=parts,
        PADDED=padded,
        ROWS=power_of_two(block_length),
        STEP=max(power_of_two(block_length), FLAGS // padded),
    )
    return Planned(planned, indptr, order, most)


@triton.jit
def _active_kernel(
    change: tl.tensor,
    counts: tl.tensor,
    taus: tl.tensor,
    fresh: tl.tensor,
    active: tl.tensor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Program (segment, part): every row is compared with every other."""
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = change + (segment * PARTS + part) * BLOCK
    row = tl.arange(0, ROWS)
    mine = _number(tl.load(base + row, mask=row < BLOCK, other=0.0))
    # The same values once more, along the other axis.
    other = tl.arange(0, ROWS)
    theirs = _number(tl.load(base + other, mask=other < BLOCK, other=0.0))
    more = theirs[None, :] > mine[:, None]
    level = (theirs[None, :] == mine[:, None]) & (other[None, :] < row[:, None])
    ahead = (more | level) & (other < BLOCK)[None, :]
    rank = tl.sum(ahead.to(tl.int32), 1)
    above = tl.sum(tl.where(ahead, theirs[None, :], 0.0), 1)
    share = tl.load(taus + segment) * tl.sum(theirs, 0)
    chosen = (rank < tl.load(counts + segment)) | (above < share) | (tl.load(fresh + segment) != 0)
    tl.store(active + (segment * BLOCK + row) * PARTS + part, chosen.to(tl.uint8), mask=row < BLOCK)


@triton.jit
def _number(change: tl.tensor) -> tl.tensor:
    """Infinity in place of what is no number: every row is ahead of or behind every other."""
    return tl.where(change == change, change, float("inf"))


@triton.jit
def _plan_kernel(
    active: tl.tensor,
    rows: tl.tensor,
    indptr: tl.tensor,
    order: tl.tensor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Program (segment): counts what is active before it, then lists its own rows."""
    first = tl.program_id(0) * BLOCK
    before = 0
    for start in range(0, first, STEP):
        some = start + tl.arange(0, STEP)
        before += tl.sum(_any_part(active, some, some < first, PARTS, PADDED), 0)
    mine = tl.arange(0, ROWS)
    taken = _any_part(active, first + mine, mine < BLOCK, PARTS, PADDED)
    place = (before + tl.cumsum(taken, 0) - taken).to(tl.int64)
    row = (first + mine).to(tl.int64)
    tl.store(rows + place, row, mask=taken != 0)
    tl.store(order + row, tl.where(taken != 0, place, -1), mask=mine < BLOCK)
    tl.store(indptr + tl.program_id(0) + 1, (before + tl.sum(taken, 0)).to(tl.int64))
    if tl.program_id(0) == 0:
        tl.store(indptr, tl.zeros((), tl.int64))


@triton.jit
def _any_part(
    active: tl.tensor, row: tl.tensor, real: tl.tensor, PARTS: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """1 for each row that has an active part, else 0: int32."""
    part = tl.arange(0, PADDED)
    mask = real[:, None] & (part < PARTS)[None, :]
    flags = tl.load(active + row[:, None] * PARTS + part[None, :], mask=mask, other=0)
    return tl.max((flags != 0).to(tl.int32), 1)
