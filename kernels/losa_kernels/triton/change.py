"""How much queries changed: one sum per row and part, against what is remembered of a slot.

A part is the whole row, or one of its heads. S segments, B block length, R = S * B rows, H query heads, D head dim,
X slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, check

TILE = 1024  # channels of a step of the loop


def query_change(
    now_RHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, fresh_S: Tensor, per_head: bool = False, replace: bool = True
) -> Tensor:
    """Mean squared difference of each row's query to the one remembered for its slot: float32 [S, parts, B].

    parts: 1, or H with per_head. fresh_S: bool, True = nothing is remembered yet, the change is 0. replace: afterwards
    `before` holds the queries of now. Slots are distinct. Raises ValueError.
    """
    _, length, heads, dim = _check(now_RHD, before_XBHD, slots_S)
    check("fresh", fresh_S, tuple(slots_S.shape), torch.bool)
    parts = heads if per_head else 1
    change = torch.empty(slots_S.shape[0], parts, length, dtype=torch.float32, device=now_RHD.device)
    channels = heads * dim // parts
    launch(
        _change_kernel,
        (now_RHD.shape[0], parts, 1),
        now=now_RHD,
        before=before_XBHD,
        slots=slots_S,
        fresh=fresh_S.view(torch.uint8),
        change=change,
        BLOCK=length,
        PARTS=parts,
        CHANNELS=channels,
        TILE=min(TILE, power_of_two(channels)),
        REPLACE=replace,
    )
    return change


def keep_changed(now_RHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, active_RY: Tensor) -> None:
    """Remember the queries of now where a row's part is active: bool [R, parts]; the rest stays. Raises ValueError."""
    _, length, heads, dim = _check(now_RHD, before_XBHD, slots_S)
    parts = check("active", active_RY, (now_RHD.shape[0], None), torch.bool).shape[1]
    if heads % parts:
        raise ValueError(f"active: found {parts} parts, allowed: divisors of {heads} heads")
    channels = heads * dim // parts
    launch(
        _keep_kernel,
        (now_RHD.shape[0], parts, 1),
        now=now_RHD,
        before=before_XBHD,
        slots=slots_S,
        active=active_RY.view(torch.uint8),
        BLOCK=length,
        PARTS=parts,
        CHANNELS=channels,
        TILE=min(TILE, power_of_two(channels)),
    )


def _check(now: Tensor, before: Tensor, slots: Tensor) -> tuple[int, int, int, int]:
    check("before", before, (None, None, None, None), *FLOATS)
    check("slots", slots, (None,), torch.int64)
    check("now", now, (slots.shape[0] * before.shape[1], *before.shape[2:]), before.dtype)
    count, length, heads, dim = before.shape
    return count, length, heads, dim


@triton.jit
def _change_kernel(
    now: tl.tensor,
    before: tl.tensor,
    slots: tl.tensor,
    fresh: tl.tensor,
    change: tl.tensor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    REPLACE: tl.constexpr,
) -> None:
    """Program (row, part)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment = row // BLOCK
    known = tl.load(fresh + segment) == 0
    at = (row * PARTS + part) * CHANNELS
    kept_at = ((tl.load(slots + segment) * BLOCK + row % BLOCK) * PARTS + part) * CHANNELS
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, CHANNELS, TILE):
        channel = start + tl.arange(0, TILE)
        real = channel < CHANNELS
        query = tl.load(now + at + channel, mask=real, other=0.0)
        kept = tl.load(before + kept_at + channel, mask=real & known, other=0.0)
        difference = query.to(tl.float32) - kept.to(tl.float32)
        total += difference * difference
        if REPLACE:
            tl.store(before + kept_at + channel, query, mask=real)
    mean = tl.where(known, tl.sum(total, 0) / CHANNELS, 0.0)
    tl.store(change + (segment * PARTS + part) * BLOCK + row % BLOCK, mean)


@triton.jit
def _keep_kernel(
    now: tl.tensor,
    before: tl.tensor,
    slots: tl.tensor,
    active: tl.tensor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program (row, part)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(active + row * PARTS + part) == 0:
        return
    at = (row * PARTS + part) * CHANNELS
    kept_at = ((tl.load(slots + row // BLOCK) * BLOCK + row % BLOCK) * PARTS + part) * CHANNELS
    for start in range(0, CHANNELS, TILE):
        channel = start + tl.arange(0, TILE)
        query = tl.load(now + at + channel, mask=channel < CHANNELS, other=0.0)
        tl.store(before + kept_at + channel, query, mask=channel < CHANNELS)
