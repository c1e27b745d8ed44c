"""Attention calls: the prefix over lists or whole, block-causal prefill, in-block attention, merging.

S segments, B block length, R rows of the group, n computed rows, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, Segments, check, query, ref
from losa_kernels.native.library import CLists, CPrefix, Kernels

PEAK_CHUNK = 1024  # kChunk in csrc/level.h: a page never lies in two chunks


def prefix(
    kernels: Kernels,
    pages: Pages,
    segments: Segments,
    q_RHD: Tensor,
    scale: float,
    rows: Tensor | None = None,
    lists: Lists | None = None,
    peaks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of rows (None: all) to what `lists` name of their prefixes (None: all): float32 [n, H, D], [n, H].

    The log-sum-exp is natural; a row that reads nothing gets 0 and -inf. peaks: float32 [n, H, P] to be filled with
    each row's largest scaled score per page where it reads a whole prefix, -inf elsewhere; the page size must then
    divide PEAK_CHUNK. Raises ValueError.
    """
    asked = query(q_RHD, rows, pages.head_dim, scale)
    out = torch.empty(asked.computed, asked.heads, pages.head_dim)
    lse = torch.empty(asked.computed, asked.heads)
    listed = None
    if lists is not None:
        owners = asked.computed if lists.per_row else segments.count
        check("indptr", lists.indptr, (owners * lists.heads + 1,), torch.int64)
        check("whole", lists.whole, (segments.count,), torch.uint8)
        listed = ref(lists.c)
    where: tuple[int | None, ...] = (out.data_ptr(), lse.data_ptr(), None, 0)
    if peaks is not None:
        check("peaks", peaks, (asked.computed, asked.heads, None), torch.float32)
        where = (*where[:2], peaks.data_ptr(), peaks.shape[2])
    kernels.call("losa_prefix", ref(pages.c), ref(segments.c), ref(asked.c), listed, *where)
    return out, lse


class Lists:
    """Granules to read in CSR form, ordered by owner (segment, or computed row with per_row), then head.

    indptr int64 [owners * heads + 1], indices int64, sorted and unique in each list; whole: uint8 [S], 1 = the segment
    reads its whole prefix and its lists are empty.
    """

    def __init__(
        self, indptr: Tensor, indices: Tensor, heads: int, whole: Sequence[bool], granule: int, per_row: bool = False
    ) -> None:
        self.indptr = check("indptr", indptr, (None,), torch.int64)
        self.indices = check("indices", indices, (None,), torch.int64)
        self.whole = torch.tensor(whole, dtype=torch.uint8)
        self.heads, self.per_row = heads, per_row
        places = (indptr.data_ptr(), indices.data_ptr(), indices.shape[0], self.whole.data_ptr())
        self.c = CLists(*places, granule, heads, int(per_row))


def prefill(kernels: Kernels, pages: Pages, segments: Segments, q_RHD: Tensor, counts: Tensor, scale: float) -> Tensor:
    """Block-causal attention of stored rows, counts int64 [S] per segment: float32 [R, H, D]. Raises ValueError."""
    asked = query(q_RHD, None, pages.head_dim, scale)
    check("counts", counts, (segments.count,), torch.int64)
    out = torch.empty_like(q_RHD)
    where = (counts.data_ptr(), out.data_ptr())
    kernels.call("losa_prefill", ref(pages.c), ref(segments.c), ref(asked.c), *where)
    return out


def block(
    kernels: Kernels, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, block_length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each B rows to their own k, v, all float32: out [R, H, D], lse [R, H]. Raises ValueError."""
    lse = torch.empty(q_RHD.shape[:2])
    return _block(kernels, q_RHD, k_RGD, v_RGD, block_length, scale, None, lse), lse


class Kept(NamedTuple):
    """Prefix states of earlier steps, out [Y, H, D] and lse [Y, H] float32; row r has place[r], int64 [R], no two the
    same (None: its own number, and Y is R)."""

    out: Tensor
    lse: Tensor
    place: Tensor | None = None


class Fresh(NamedTuple):
    """New prefix states, out [n, H, D] and lse [n, H] float32, of the sorted `rows`, int64 [n] (None: all), and for
    which heads they count, bool [n, H] (None: all)."""

    out: Tensor
    lse: Tensor
    rows: Tensor | None = None
    heads: Tensor | None = None


def finish_block(
    kernels: Kernels,
    q_RHD: Tensor,
    k_RGD: Tensor,
    v_RGD: Tensor,
    block_length: int,
    scale: float,
    kept: Kept,
    fresh: Fresh | None = None,
) -> Tensor:
    """Attention of each row to its prefix and its block, all float32: out [R, H, D]. Raises ValueError.

    The prefix state of a row is its fresh one, which then becomes the kept one, or else the kept one.
    """
    rows, *shape = check("q", q_RHD, (None, None, None), torch.float32).shape
    check("kept out", kept.out, (None, *shape), torch.float32)
    check("kept lse", kept.lse, (kept.out.shape[0], shape[0]), torch.float32)
    at_place = None if kept.place is None else check("place", kept.place, (rows,), torch.int64).data_ptr()
    states = CPrefix(kept.out.data_ptr(), kept.lse.data_ptr(), kept.out.shape[0], at_place)
    if fresh is not None:
        count = rows if fresh.rows is None else check("rows", fresh.rows, (None,), torch.int64).shape[0]
        states.fresh_out = check("fresh out", fresh.out, (count, *shape), torch.float32).data_ptr()
        states.fresh_lse = check("fresh lse", fresh.lse, (count, shape[0]), torch.float32).data_ptr()
        states.rows = None if fresh.rows is None else fresh.rows.data_ptr()
        states.count = count
        if fresh.heads is not None:
            states.heads = check("heads", fresh.heads, (count, shape[0]), torch.bool).data_ptr()
    return _block(kernels, q_RHD, k_RGD, v_RGD, block_length, scale, states, None)


def _block(
    kernels: Kernels,
    q_RHD: Tensor,
    k_RGD: Tensor,
    v_RGD: Tensor,
    block_length: int,
    scale: float,
    states: CPrefix | None,
    lse: Tensor | None,
) -> Tensor:
    check("k", k_RGD, (q_RHD.shape[0], None, None), torch.float32)
    check("v", v_RGD, tuple(k_RGD.shape), torch.float32)
    asked = query(q_RHD, None, k_RGD.shape[2], scale)
    out = torch.empty_like(q_RHD)
    places = (k_RGD.data_ptr(), v_RGD.data_ptr(), block_length, k_RGD.shape[1], k_RGD.shape[2])
    into = (out.data_ptr(), None if lse is None else lse.data_ptr())
    kernels.call("losa_block", ref(asked.c), *places, None if states is None else ref(states), *into)
    return out


def merge(kernels: Kernels, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the union of two disjoint key sets, out [R, H, D] and lse [R, H] each: float32 [R, H, D]."""
    check("out", a[0], (None, None, None), torch.float32)
    check("other out", b[0], tuple(a[0].shape), torch.float32)
    for lse in (a[1], b[1]):
        check("lse", lse, tuple(a[0].shape[:2]), torch.float32)
    out = torch.empty_like(a[0])
    inputs = (x.data_ptr() for x in (*a, *b))
    kernels.call("losa_merge", a[1].numel(), a[0].shape[2], *inputs, out.data_ptr())
    return out
