"""Page lists in the layout of paged attention libraries, and what such a library answers, back in our own.

An *entry* is a stretch of one list with its own queries: there is one per (segment, list head, split). Lists are cut
on the device, evenly, so that only bounds of their lengths are known to the host. The cache is viewed as pages of one
head and `granule` tokens; there, a library's log-sum-exp has base 2, and a finite number stands for an empty list.
S segments, B block length, n planned rows, H query heads, E list heads, F = H / E, C splits, A slots, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Lists, Pages, Planned, Segments, check
from losa_kernels.triton.states import load_vectors, store_vectors

LISTED = 1024  # granules of a step of the loop that writes
COUNTED = 1024  # lists of a step of the loop that counts the granules before one
VECTORS = 16

EMPTY = tl.constexpr(-4.0e4)  # base-2 log-sum-exps down to here belong to lists without keys
LN2 = tl.constexpr(0.6931471805599453)


class Entries(NamedTuple):
    """Entry e reads pages[indptr[e] : indptr[e + 1]], all tokens of each but the last, and last[e] of that.

    All int32 and written to by `fill_entries`. pages: numbers in the cache viewed as [-1, 1, granule, D].
    """

    indptr: Tensor
    pages: Tensor
    last: Tensor


def fill_entries(into: Entries, pages: Pages, segments: Segments, splits: int, lists: Lists | None = None) -> None:
    """Cut lists (None: the whole prefix for each KV head) into `splits` entries each. Raises ValueError.

    The granule of the lists divides the page size. Entries behind those of the last list become empty. What does not
    fit into into.pages is not written: its size is to be a bound on the granules of all lists together.
    """
    heads, granule = (pages.kv_heads, pages.page_size) if lists is None else (lists.heads, lists.granule)
    room = check("last", into.last, (None,), torch.int32).shape[0]
    check("indptr of entries", into.indptr, (room + 1,), torch.int32)
    check("pages of entries", into.pages, (None,), torch.int32)
    if room % splits or room < segments.count * heads * splits:
        raise ValueError(
            f"entries: found room for {room}, allowed: {splits} for each of at least {segments.count * heads} lists"
        )
    if granule < 1 or pages.page_size % granule:
        raise ValueError(f"granule: found {granule}, allowed: divisors of the page size {pages.page_size}")
    if lists is not None:
        if lists.per_row:
            raise ValueError("lists: found lists per row, allowed: lists per segment")
        check("indptr of lists", lists.indptr, (segments.count * heads + 1,), torch.int64)
        check("whole", lists.whole, (segments.count,), torch.bool)
    launch(
        _entries_kernel,
        (room // splits, 1, 1),
        list_indptr=None if lists is None else lists.indptr,
        indices=None if lists is None else lists.indices,
        whole=None if lists is None else lists.whole.view(torch.uint8),
        table_indptr=segments.table_indptr,
        table=segments.table,
        prefix_lens=segments.prefix_lens,
        entry_indptr=into.indptr,
        entry_pages=into.pages,
        entry_last=into.last,
        lists=segments.count * heads,
        capacity=into.pages.shape[0],
        splits=splits,
        LIST_HEADS=heads,
        KV_HEADS=pages.kv_heads,
        PAGE=pages.page_size,
        GRANULE=granule,
        STEP=COUNTED,
        LISTED=LISTED,
    )


def merge_entries(out: Tensor, lse: Tensor, planned: Planned, block_length: int) -> tuple[Tensor, Tensor]:
    """One state per planned row from those of its entries: float32 out [n, H, D] and natural lse [n, H].

    out: [S, E, C, A, F, D], lse: float32 [S, E, C, A, F], base 2; the first slots hold a segment's planned rows, in
    order. Undefined behind the last planned row. Raises ValueError.
    """
    segments, list_heads, splits, slots, share, dim = check("out", out, (None,) * 6, *FLOATS).shape
    check("lse", lse, tuple(out.shape[:5]), torch.float32)
    if planned.indptr.shape[0] - 1 > segments or slots < max(planned.most or (block_length,)):
        raise ValueError(f"out: found {segments} segments, {slots} slots, allowed: at least as many as are planned")
    heads = list_heads * share
    state = torch.empty(planned.room, heads, dim, dtype=torch.float32, device=out.device)
    natural = torch.empty(planned.room, heads, dtype=torch.float32, device=out.device)
    launch(
        _merge_entries_kernel,
        (-(-planned.room * heads // VECTORS), 1, 1),
        entries_out=out,
        entries_lse=lse,
        rows=planned.rows,
        row_indptr=planned.indptr,
        out=state,
        lse=natural,
        segments=planned.indptr.shape[0] - 1,
        splits=splits,
        slots=slots,
        BLOCK=block_length,
        LIST_HEADS=list_heads,
        SHARE=share,
        DIM=dim,
        WIDTH=power_of_two(dim),
        VECTORS=VECTORS,
    )
    return state, natural


@triton.jit(do_not_specialize=["lists", "capacity", "splits"])
def _entries_kernel(
    list_indptr: tl.tensor,
    indices: tl.tensor,
    whole: tl.tensor,
    table_indptr: tl.tensor,
    table: tl.tensor,
    prefix_lens: tl.tensor,
    entry_indptr: tl.tensor,
    entry_pages: tl.tensor,
    entry_last: tl.tensor,
    lists: tl.tensor,
    capacity: tl.tensor,
    splits: tl.tensor,
    LIST_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    GRANULE: tl.constexpr,
    STEP: tl.constexpr,
    LISTED: tl.constexpr,
) -> None:
    """Program (list)."""
    a_list = tl.program_id(0)
    begin = tl.zeros((), tl.int32)
    for start in range(0, tl.minimum(a_list, lists), STEP):
        earlier = start + tl.arange(0, STEP)
        counted = (earlier < a_list) & (earlier < lists)
        begin += tl.sum(_sizes(list_indptr, whole, prefix_lens, earlier, counted, LIST_HEADS, GRANULE), 0)
    # A tile of one, so that the function above serves here too.
    me = a_list + tl.arange(0, 1)
    size = tl.sum(_sizes(list_indptr, whole, prefix_lens, me, me < lists, LIST_HEADS, GRANULE), 0)
    chunk = tl.maximum(1, (size + splits - 1) // splits)
    for split in range(splits):
        tl.store(entry_indptr + a_list * splits + split, begin + tl.minimum(split * chunk, size))
        tl.store(entry_last + a_list * splits + split, GRANULE)
    if a_list == tl.num_programs(0) - 1:
        tl.store(entry_indptr + (a_list + 1) * splits, begin + size)
    if size > 0:
        segment, head = (a_list // LIST_HEADS).to(tl.int64), a_list % LIST_HEADS
        kv_head = head * KV_HEADS // LIST_HEADS
        prefix_len = tl.load(prefix_lens + segment).to(tl.int32)
        my_table = table + tl.load(table_indptr + segment)
        everything = prefix_len >= 0
        from_at = tl.zeros((), tl.int64)
        if list_indptr is not None:
            everything = tl.load(whole + segment) != 0
            from_at = tl.load(list_indptr + a_list)
        for start in range(0, size, LISTED):
            place = start + tl.arange(0, LISTED)
            real = place < size
            number = place
            if list_indptr is not None:
                listed = tl.load(indices + from_at + place, mask=real & (everything == 0), other=0).to(tl.int32)
                number = tl.where(everything, place, listed)
            position = number * GRANULE
            page = tl.load(my_table + position // PAGE, mask=real, other=0)
            folded = (page * KV_HEADS + kv_head) * (PAGE // GRANULE) + (position % PAGE) // GRANULE
            tl.store(entry_pages + begin + place, folded.to(tl.int32), mask=real & (begin + place < capacity))
            # Lists ascend, so what ends with the prefix comes last.
            is_last = place == size - 1
            rest = tl.minimum(GRANULE, prefix_len - position)
            entry = a_list * splits + (size - 1) // chunk
            tl.store(entry_last + entry + tl.zeros((LISTED,), tl.int32), rest, mask=is_last)


@triton.jit
def _sizes(
    list_indptr: tl.tensor,
    whole: tl.tensor,
    prefix_lens: tl.tensor,
    number: tl.tensor,
    real: tl.tensor,
    LIST_HEADS: tl.constexpr,
    GRANULE: tl.constexpr,
) -> tl.tensor:
    """Granules that each of some lists names: int32, 0 where not real."""
    segment = number // LIST_HEADS
    everything = (tl.load(prefix_lens + segment, mask=real, other=0) + GRANULE - 1) // GRANULE
    if list_indptr is None:
        return everything.to(tl.int32)
    first = tl.load(list_indptr + number, mask=real, other=0)
    listed = tl.load(list_indptr + number + 1, mask=real, other=0) - first
    all_ = tl.load(whole + segment, mask=real, other=0) != 0
    return tl.where(all_, everything, listed).to(tl.int32)


@triton.jit(do_not_specialize=["segments", "splits", "slots"])
def _merge_entries_kernel(
    entries_out: tl.tensor,
    entries_lse: tl.tensor,
    rows: tl.tensor,
    row_indptr: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    segments: tl.tensor,
    splits: tl.tensor,
    slots: tl.tensor,
    BLOCK: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
) -> None:
    """Program (tile of vectors). Those behind the last planned row are left alone."""
    HEADS: tl.constexpr = LIST_HEADS * SHARE
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    real = vector < tl.load(row_indptr + segments) * HEADS
    place, head = vector // HEADS, vector % HEADS
    segment = tl.load(rows + place, mask=real, other=0) // BLOCK
    slot = place - tl.load(row_indptr + segment, mask=real, other=0)
    # Of the first split; the next one lies `slots` vectors of all its heads further on.
    base = (segment * LIST_HEADS + head // SHARE) * splits
    top = tl.full((VECTORS,), float("-inf"), tl.float32)
    for split in range(splits):
        at = ((base + split) * slots + slot) * SHARE + head % SHARE
        top = tl.maximum(top, tl.load(entries_lse + at, mask=real, other=EMPTY))
    total = tl.zeros((VECTORS,), tl.float32)
    state = tl.zeros((VECTORS, WIDTH), tl.float32)
    for split in range(splits):
        at = ((base + split) * slots + slot) * SHARE + head % SHARE
        one = tl.load(entries_lse + at, mask=real, other=EMPTY)
        weight = tl.where(one > EMPTY, tl.exp2(one - top), 0.0)
        total += weight
        state += weight[:, None] * load_vectors(entries_out, at, real & (one > EMPTY), DIM, WIDTH)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    store_vectors(out, vector, state / divisor[:, None], real, DIM, WIDTH)
    tl.store(lse + vector, tl.where(empty, float("-inf"), (top + tl.log2(divisor)) * LN2), mask=real)
