"""Selection calls: page bounds, the best pages and their union, the changed rows.

S segments, B block length, R rows of the group, n scored rows, H query heads, G KV heads, P most pages of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, Segments, check, query, ref
from losa_kernels.native.library import DTYPES, Kernels


class Chosen(NamedTuple):
    """Pages per segment and KV head in CSR form: indptr int64 [S * G + 1], indices int64. seen: scored rows [S]."""

    indptr: Tensor
    indices: Tensor
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
) -> Chosen:
    """The union over rows (None: all) of each row's best_S[s] pages per KV head; segments in `whole` choose none.

    Equal to the reference's page_scores, share_scores, top_pages and union_rows up to the rounding of scores.
    """
    asked = query(q_RHD, rows, pages.head_dim)
    check("best", best_S, (segments.count,), torch.int64)
    skipped = torch.tensor(whole, dtype=torch.uint8)
    check("whole", skipped, (segments.count,), torch.uint8)
    held = (segments.prefix_lens + pages.page_size - 1) // pages.page_size
    capacity = pages.kv_heads * int(torch.minimum(held, best_S * segments.block_length).clamp(min=0).sum())
    indptr = torch.empty(segments.count * pages.kv_heads + 1, dtype=torch.int64)
    indices, seen = torch.empty(capacity, dtype=torch.int64), torch.empty(segments.count, dtype=torch.int64)
    places = (skipped.data_ptr(), best_S.data_ptr(), capacity, *(x.data_ptr() for x in (indptr, indices, seen)))
    kernels.call("losa_select_pages", ref(pages.c), ref(segments.c), ref(asked.c), *places)
    return Chosen(indptr, indices[: int(indptr[-1])], seen.tolist())


def changed_rows(
    kernels: Kernels,
    now_RHD: Tensor,
    before_XBHD: Tensor,
    slots_S: Tensor,
    fresh: Sequence[bool],
    count_S: Tensor,
    share_S: Tensor,
) -> Tensor:
    """Active rows of S segments, int64 sorted; before_XBHD[slots_S] (same dtype) is compared with and becomes now.

    fresh: per segment, True = every row. count_S int64: the most changed rows. share_S float32: those before which
    less than this share of the segment's change lies. 0 switches a rule off.
    """
    check("before", before_XBHD, (None, None, *now_RHD.shape[1:]), *DTYPES)
    slots, length = before_XBHD.shape[:2]
    segments = slots_S.shape[0]
    check("now", now_RHD, (segments * length, *before_XBHD.shape[2:]), before_XBHD.dtype)
    check("slots", slots_S, (segments,), torch.int64)
    check("count", count_S, (segments,), torch.int64)
    check("share", share_S, (segments,), torch.float32)
    first = check("fresh", torch.tensor(fresh, dtype=torch.uint8), (segments,), torch.uint8)
    rows, count = torch.empty(segments * length, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    sizes = (DTYPES[now_RHD.dtype], segments, length, now_RHD[0].numel(), slots)
    places = (x.data_ptr() for x in (slots_S, first, count_S, share_S, rows, count))
    kernels.call("losa_changed_rows", now_RHD.data_ptr(), before_XBHD.data_ptr(), *sizes, *places)
    return rows[: int(count)]
