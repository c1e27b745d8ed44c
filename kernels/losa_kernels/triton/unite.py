"""From what rows chose to lists: the union over a segment's rows, or each row's own choice, compacted on the device.

One kernel marks what is chosen and counts it per tile of pages; the other sums the counts before a list and writes it.
S segments, n planned rows, E lists per owner, P pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.choose import Bars
from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import Lists, Planned, Segments, check, check_planned

MARKS = 4096  # scores of a program that marks
LISTED_PAGES = 1024  # of a step of the loop that lists
COUNTS = 2048  # of a step of the loop that sums


def page_lists(
    scores_nEP: Tensor,
    bars: Bars,
    planned: Planned,
    segments: Segments,
    page_size: int,
    whole_S: Tensor,
    capacity: int,
    most: int,
    per_row: bool = False,
) -> Lists:
    """Sorted lists of pages, per segment the union over its planned rows, or per planned row. Raises ValueError.

    whole_S: bool, as in `Lists`; the bars of such segments take nothing. capacity: bound on the pages of all lists
    together. most: as in `Lists`. Owners behind the last planned row have empty lists.
    """
    room, lists, width = check("scores", scores_nEP, (planned.room, None, None), torch.float32).shape
    check_planned(planned, segments)
    check("bar", bars.bar, (room, lists), torch.float32)
    check("cutoff", bars.cutoff, (room, lists), torch.int32)
    check("whole", whole_S, (segments.count,), torch.bool)
    owners, device = room if per_row else segments.count, scores_nEP.device
    rows = 1 if per_row else power_of_two(segments.block_length)
    pages = min(LISTED_PAGES, max(1, MARKS // rows))
    tiles = -(-width // pages)
    marks = torch.empty(owners, lists, width, dtype=torch.uint8, device=device)
    counts = torch.empty(owners, lists, tiles, dtype=torch.int32, device=device)
    indptr = torch.empty(owners * lists + 1, dtype=torch.int64, device=device)
    indices = torch.empty(capacity, dtype=torch.int64, device=device)
    launch(
        _mark_kernel,
        (owners, lists, tiles),
        scores=scores_nEP,
        bar=bars.bar,
        cutoff=bars.cutoff,
        row_indptr=planned.indptr,
        marks=marks,
        counts=counts,
        segments=segments.count,
        width=width,
        LISTS=lists,
        ROWS=rows,
        PAGES=pages,
        PER_ROW=per_row,
    )
    launch(
        _list_kernel,
        (owners * lists, 1, 1),
        marks=marks,
        counts=counts,
        indptr=indptr,
        indices=indices,
        width=width,
        tiles=tiles,
        capacity=capacity,
        PAGES=LISTED_PAGES,
        STEP=COUNTS,
    )
    return Lists(indptr, indices, lists, page_size, whole_S, most, per_row)


@triton.jit(do_not_specialize=["segments", "width"])
def _mark_kernel(
    scores: tl.tensor,
    bar: tl.tensor,
    cutoff: tl.tensor,
    row_indptr: tl.tensor,
    marks: tl.tensor,
    counts: tl.tensor,
    segments: tl.tensor,
    width: tl.tensor,
    LISTS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    PER_ROW: tl.constexpr,
) -> None:
    """Program (owner, list, tile of pages)."""
    owner, in_owner = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PER_ROW:
        first = owner
        end = tl.minimum(owner + 1, tl.load(row_indptr + segments))
    else:
        first = tl.load(row_indptr + owner)
        end = tl.load(row_indptr + owner + 1)
    page = tl.program_id(2) * PAGES + tl.arange(0, PAGES)
    place = first + tl.arange(0, ROWS)
    real = place < end
    mine = place * LISTS + in_owner
    level = tl.load(bar + mine, mask=real, other=float("inf"))
    last = tl.load(cutoff + mine, mask=real, other=-1)
    mask = real[:, None] & (page < width)[None, :]
    score = tl.load(scores + mine[:, None] * width + page[None, :], mask=mask, other=float("-inf"))
    chosen = (score > level[:, None]) | ((score == level[:, None]) & (page[None, :] <= last[:, None]))
    chosen_by_any = tl.max((chosen & mask).to(tl.int32), 0)
    a_list = owner * LISTS + in_owner
    tl.store(marks + a_list * width + page, chosen_by_any.to(tl.uint8), mask=page < width)
    tl.store(counts + a_list * tl.num_programs(2) + tl.program_id(2), tl.sum(chosen_by_any, 0))


@triton.jit(do_not_specialize=["width", "tiles", "capacity"])
def _list_kernel(
    marks: tl.tensor,
    counts: tl.tensor,
    indptr: tl.tensor,
    indices: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    capacity: tl.tensor,
    PAGES: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Program (list)."""
    a_list = tl.program_id(0)
    if a_list == 0:
        tl.store(indptr, tl.zeros((), tl.int64))
    end = tl.zeros((), tl.int32)
    for start in range(0, a_list * tiles, STEP):
        at = start + tl.arange(0, STEP)
        end += tl.sum(tl.load(counts + at, mask=at < a_list * tiles, other=0), 0)
    for start in range(0, width, PAGES):
        page = start + tl.arange(0, PAGES)
        marked = tl.load(marks + a_list.to(tl.int64) * width + page, mask=page < width, other=0).to(tl.int32)
        place = end + tl.cumsum(marked, 0) - marked
        tl.store(indices + place, page.to(tl.int64), mask=(marked != 0) & (place < capacity))
        end += tl.sum(marked, 0)
    tl.store(indptr + a_list + 1, end.to(tl.int64))
