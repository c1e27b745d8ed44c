"""The best pages of each planned row: an exact bar per list, found by bits, ties to the lowest page.

A list's choice is every page whose score is above the bar, and those level with it up to a cutoff. The bar is the score
that exactly `best` pages reach, so nothing depends on an order of sums, a sorting routine or padding.
S segments, n planned rows, H query heads, G KV heads, E lists per row, P pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import Planned, Segments, check, check_planned

HELD_PAGES = 4096  # as many scores a program keeps in registers; more are read again for every bit
NUMBERS_PER_WARP = 512


class Bars(NamedTuple):
    """What a list takes: pages with a score above bar, float32 [n, E], or level and up to cutoff, int32 [n, E]."""

    bar: Tensor
    cutoff: Tensor


def page_bars(
    scores_nEP: Tensor,
    planned: Planned,
    segments: Segments,
    page_size: int,
    best_S: Tensor,
    whole_S: Tensor,
    context_pages: int,
    heads_nH: Tensor | None = None,
) -> Bars:
    """The best_S[s] pages of each row and list, all where a prefix has fewer. Raises ValueError.

    best_S: int64. whole_S: bool, True = the rows of the segment choose nothing. context_pages: most pages of any
    request, fixed for the life of an engine. heads_nH: bool, heads that take part; a list without any takes nothing.
    """
    room, lists, width = check("scores", scores_nEP, (planned.room, None, None), torch.float32).shape
    check_planned(planned, segments)
    check("best", best_S, (segments.count,), torch.int64)
    check("whole", whole_S, (segments.count,), torch.bool)
    heads = lists
    if heads_nH is not None:
        heads = check("heads", heads_nH, (room, None), torch.bool).shape[1]
        if heads % lists:
            raise ValueError(f"heads: found {heads}, allowed: multiples of the {lists} lists")
    bars = Bars(
        torch.empty(room, lists, dtype=torch.float32, device=scores_nEP.device),
        torch.empty(room, lists, dtype=torch.int32, device=scores_nEP.device),
    )
    tile = min(HELD_PAGES, max(128, power_of_two(context_pages)))
    launch(
        _bars_kernel,
        (room, lists, 1),
        warps=min(8, max(1, tile // NUMBERS_PER_WARP)),
        scores=scores_nEP,
        rows=planned.rows,
        row_indptr=planned.indptr,
        prefix_lens=segments.prefix_lens,
        best=best_S,
        whole=whole_S.view(torch.uint8),
        taking=None if heads_nH is None else heads_nH.view(torch.uint8),
        bar=bars.bar,
        cutoff=bars.cutoff,
        segments=segments.count,
        width=width,
        BLOCK=segments.block_length,
        LISTS=lists,
        SHARE=heads // lists,
        PADDED=power_of_two(heads // lists),
        PAGE=page_size,
        TILE=tile,
        HELD=context_pages <= tile,
    )
    return bars


@triton.jit(do_not_specialize=["segments", "width"])
def _bars_kernel(
    scores: tl.tensor,
    rows: tl.tensor,
    row_indptr: tl.tensor,
    prefix_lens: tl.tensor,
    best: tl.tensor,
    whole: tl.tensor,
    taking: tl.tensor,
    bar: tl.tensor,
    cutoff: tl.tensor,
    segments: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    LISTS: tl.constexpr,
    SHARE: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,
) -> None:
    """Program (planned row, list)."""
    place, in_row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if place >= tl.load(row_indptr + segments):
        return
    segment = tl.load(rows + place) // BLOCK
    pages = ((tl.load(prefix_lens + segment) + PAGE - 1) // PAGE).to(tl.int32)
    wanted = tl.minimum(tl.load(best + segment).to(tl.int32), pages)
    wanted = tl.where(tl.load(whole + segment) != 0, 0, wanted)
    if taking is not None:
        head = tl.arange(0, PADDED)
        flags = tl.load(taking + (place * LISTS + in_row) * SHARE + head, mask=head < SHARE, other=0)
        wanted = tl.where(tl.max((flags != 0).to(tl.int32), 0) != 0, wanted, 0)
    mine = place * LISTS + in_row
    if wanted <= 0:
        tl.store(bar + mine, float("inf"))
        tl.store(cutoff + mine, -1)
    else:
        found, last = _search(scores + mine * width, pages, wanted, TILE, HELD)
        tl.store(bar + mine, found)
        tl.store(cutoff + mine, last)


@triton.jit
def _search(
    scores: tl.tensor, pages: tl.tensor, wanted: tl.tensor, TILE: tl.constexpr, HELD: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The wanted-th largest of the scores, and the page up to which those level with it are taken."""
    held = _ordered(scores, 0, pages, TILE)
    found = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = found | bit
        if HELD:
            count = tl.sum((held >= higher).to(tl.int32), 0)
        else:
            count = tl.zeros((), tl.int32)
            for start in range(0, pages, TILE):
                count += tl.sum((_ordered(scores, start, pages, TILE) >= higher).to(tl.int32), 0)
        found = tl.where(count >= wanted, higher, found)
        bit = bit >> 1
    above = tl.zeros((), tl.int32)
    for start in range(0, pages, TILE):
        above += tl.sum((_ordered(scores, start, pages, TILE) > found).to(tl.int32), 0)
    room = wanted - above
    last = tl.full((), -1, tl.int32)
    for start in range(0, pages, TILE):
        level = (_ordered(scores, start, pages, TILE) == found).to(tl.int32)
        fits = (level != 0) & (tl.cumsum(level, 0) <= room)
        last = tl.maximum(last, tl.max(tl.where(fits, start + tl.arange(0, TILE), -1), 0))
        room -= tl.sum(level, 0)
    return _score(found), last


@triton.jit
def _ordered(scores: tl.tensor, start: tl.tensor, pages: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Scores as unsigned numbers of the same order, the two zeros level; 0, which no score is, behind the last page."""
    page = start + tl.arange(0, TILE)
    score = tl.load(scores + page, mask=page < pages, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    number = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(page < pages, number, 0)


@triton.jit
def _score(number: tl.tensor) -> tl.tensor:
    """The score of such a number."""
    bits = tl.where((number >> 31) != 0, number & 0x7FFFFFFF, number ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)
