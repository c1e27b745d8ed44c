"""Attention calls: the prefix over lists or whole, block-causal prefill, in-block attention, merging.

S segments, B block length, R rows of the group, n computed rows, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, Segments, check, query, ref
from losa_kernels.native.library import CLists, Kernels

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
    kernels: Kernels,
    q_RHD: Tensor,
    k_RGD: Tensor,
    v_RGD: Tensor,
    block_length: int,
    scale: float,
    prefix_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each B rows to their own k, v, all float32: out [R, H, D], lse [R, H].

    prefix_state: a part over other keys (out [R, H, D], lse [R, H]) that `out` is merged with; lse stays the block's.
    """
    check("k", k_RGD, (q_RHD.shape[0], None, None), torch.float32)
    check("v", v_RGD, tuple(k_RGD.shape), torch.float32)
    asked = query(q_RHD, None, k_RGD.shape[2], scale)
    out, lse = torch.empty_like(q_RHD), torch.empty(q_RHD.shape[:2])
    other = [None, None]
    if prefix_state is not None:
        shapes = (tuple(q_RHD.shape), tuple(q_RHD.shape[:2]))
        parts = zip(("prefix out", "prefix lse"), prefix_state, shapes, strict=True)
        other = [check(name, x, shape, torch.float32).data_ptr() for name, x, shape in parts]  # type: ignore[misc]
    sizes = (block_length, k_RGD.shape[1], k_RGD.shape[2])
    places = (k_RGD.data_ptr(), v_RGD.data_ptr(), *sizes, *other, out.data_ptr(), lse.data_ptr())
    kernels.call("losa_block", ref(asked.c), *places)
    return out, lse


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
