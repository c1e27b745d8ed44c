"""Selection calls: page bounds, the best pages and their union, the changed rows.

S segments, B block length, R rows of the group, n scored rows, H query heads, G KV heads, P most pages of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, Segments, check, query, ref
from losa_kernels.native.library import DTYPES, SHARES, Kernels
from losa_kernels.reference.selection import Share


class Chosen(NamedTuple):
    """Pages in CSR form: indptr int64 [owners * heads + 1], indices int64; owners are segments or rows, heads G or H.

    seen: scored rows [S].
    """

    indptr: Tensor
    indices: Tensor
    heads: int
    seen: list[int]


def page_scores(kernels: Kernels, pages: Pages, segments: Segments, q_RHD: Tensor, rows: Tensor, width: int) -> Tensor:
    """Bounds of q . k per page: float32 [n, H, width], -inf behind the last page of a row's prefix."""
    asked = query(q_RHD, rows, pages.head_dim)
    scores = torch.empty(asked.computed, asked.heads, width)
    kernels.call("losa_page_scores", ref(pages.c), ref(segments.c), ref(asked.c), width, scores.data_ptr())
    return scores


def select_pages(
    kernels: Kernels,
    pages: Pages,
    segments: Segments,
    q_RHD: Tensor,
    rows: Tensor | None,
    whole: Sequence[bool],
    best_S: Tensor,
    share: Share = "max",
    per_row: bool = False,
    heads_nH: Tensor | None = None,
) -> Chosen:
    """Each row's best_S[s] pages (rows None: all), per row or the union over a segment's; `whole` segments choose none.

    share: how query heads come to one list per KV head; "none" = a list per query head. heads_nH: bool, the heads of
    each row that take part (None: all). Equal to the reference's page_scores, share_scores, top_pages and union_rows
    up to the rounding of scores.
    """
    asked = query(q_RHD, rows, pages.head_dim)
    check("best", best_S, (segments.count,), torch.int64)
    skipped = torch.tensor(whole, dtype=torch.uint8)
    check("whole", skipped, (segments.count,), torch.uint8)
    active = None
    if heads_nH is not None:
        active = check("heads", heads_nH, (asked.computed, asked.heads), torch.bool).data_ptr()
    lists, owners = (asked.heads if share == "none" else pages.kv_heads), asked.computed if per_row else segments.count
    held = (segments.prefix_lens + pages.page_size - 1) // pages.page_size
    most = torch.minimum(held, best_S).clamp(min=0) * segments.block_length
    capacity = lists * int((most if per_row else torch.minimum(held, most)).sum())
    indptr = torch.empty(owners * lists + 1, dtype=torch.int64)
    indices, seen = torch.empty(capacity, dtype=torch.int64), torch.empty(segments.count, dtype=torch.int64)
    rule = (skipped.data_ptr(), best_S.data_ptr(), SHARES[share], int(per_row), active)
    places = (capacity, *(x.data_ptr() for x in (indptr, indices, seen)))
    kernels.call("losa_select_pages", ref(pages.c), ref(segments.c), ref(asked.c), *rule, *places)
    return Chosen(indptr, indices[: int(indptr[-1])], lists, seen.tolist())


class Changed(NamedTuple):
    """Active rows, int64 sorted, and which parts of each row are: bool [R, parts]."""

    rows: Tensor
    parts: Tensor


def changed_rows(
    kernels: Kernels,
    now_RHD: Tensor,
    before_XBHD: Tensor,
    slots_S: Tensor,
    fresh: Sequence[bool],
    count_S: Tensor,
    share_S: Tensor,
    keep_stable: bool = False,
    per_head: bool = False,
) -> Changed:
    """What changed of S segments; before_XBHD[slots_S] (same dtype) is compared with and becomes now.

    fresh: per segment, True = every row. count_S int64: the most changed rows. share_S float32: those before which
    less than this share of the segment's change lies. 0 switches a rule off. keep_stable: what is not active stays as
    it is in `before`. per_head: the parts of a row are its heads, each judged by itself; otherwise the row is one part.
    """
    check("before", before_XBHD, (None, None, *now_RHD.shape[1:]), *DTYPES)
    slots, length = before_XBHD.shape[:2]
    segments = slots_S.shape[0]
    check("now", now_RHD, (segments * length, *before_XBHD.shape[2:]), before_XBHD.dtype)
    check("slots", slots_S, (segments,), torch.int64)
    check("count", count_S, (segments,), torch.int64)
    check("share", share_S, (segments,), torch.float32)
    first = check("fresh", torch.tensor(fresh, dtype=torch.uint8), (segments,), torch.uint8)
    parts = now_RHD.shape[1] if per_head else 1
    active = torch.empty(segments * length, parts, dtype=torch.bool)
    rows, count = torch.empty(segments * length, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    sizes = (DTYPES[now_RHD.dtype], segments, length, parts, now_RHD[0].numel() // parts, slots)
    rules = (*(x.data_ptr() for x in (slots_S, first, count_S, share_S)), int(keep_stable))
    places = (x.data_ptr() for x in (active, rows, count))
    kernels.call("losa_changed_rows", now_RHD.data_ptr(), before_XBHD.data_ptr(), *sizes, *rules, *places)
    return Changed(rows[: int(count)], active)
