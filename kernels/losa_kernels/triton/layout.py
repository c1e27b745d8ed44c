"""What the kernels are told of pages, segments, rows and lists: tensors on the device and bounds known to the host.

Sizes that change from step to step lie on the device. What the host adds are bounds: they size grids and buffers and
never a result. Page ids and rows are trusted, since checking them would mean waiting for the device.
S segments, B block length, R = S * B rows, n room for planned rows, H query heads, G KV heads, D head dim, P pages of
the pool, C splits of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def check(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> Tensor:
    """`x` if it lies in one piece and has this shape (None: any) and one of the dtypes, else ValueError."""
    fits = x.ndim == len(shape) and all(want is None or want == got for want, got in zip(shape, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: found shape {list(x.shape)}, allowed: [{wanted}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: found {x.dtype}, allowed: {', '.join(map(str, dtypes))}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: found strides {x.stride()}, allowed: contiguous")
    return x


@dataclass(frozen=True, eq=False)
class Pages:
    """One layer of a page pool: k, v [P, G, page_size, D]; bounds [P, G, 2, D] in their dtype, maximum first, or None;
    moments [P, G, 2, D] float32, mean first, then mean squared deviation, or None."""

    k: Tensor
    v: Tensor
    bounds: Tensor | None = None
    moments: Tensor | None = None

    def __post_init__(self) -> None:
        check("k", self.k, (None, None, None, None), *FLOATS)
        check("v", self.v, tuple(self.k.shape), self.k.dtype)
        pages, kv_heads, _, dim = self.k.shape
        if self.bounds is not None:
            check("bounds", self.bounds, (pages, kv_heads, 2, dim), self.k.dtype)
        if self.moments is not None:
            check("moments", self.moments, (pages, kv_heads, 2, dim), torch.float32)
        if not 0 < self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"k: found head dim {self.head_dim}, allowed: 1 to {MAX_HEAD_DIM}")

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k.shape[3]


@dataclass(frozen=True, eq=False)
class Segments:
    """One block of rows per segment, and where its prefix lies.

    table_indptr: int64 [S + 1] into table, int64, the page tables one after another. prefix_lens: int64 [S].
    longest: bound on prefix_lens.
    """

    table_indptr: Tensor
    table: Tensor
    prefix_lens: Tensor
    block_length: int
    longest: int

    def __post_init__(self) -> None:
        check("prefix_lens", self.prefix_lens, (None,), torch.int64)
        check("table_indptr", self.table_indptr, (self.count + 1,), torch.int64)
        check("table", self.table, (None,), torch.int64)

    @property
    def count(self) -> int:
        """S."""
        return self.prefix_lens.shape[0]

    @property
    def rows(self) -> int:
        """R."""
        return self.count * self.block_length


class Planned(NamedTuple):
    """Rows to compute, chosen on the device, in CSR form.

    rows: int64 [n], ascending up to indptr[S], meaningless behind. indptr: int64 [S + 1], those of each segment.
    order: int64 [R], the place of each row among the planned ones, -1 = not planned. most: bound on the rows of each
    segment (None: the block length), for whoever sizes buffers.
    """

    rows: Tensor
    indptr: Tensor
    order: Tensor
    most: tuple[int, ...] | None = None

    @classmethod
    def every(cls, segments: Segments) -> Planned:
        """All rows."""
        rows = torch.arange(segments.rows, device=segments.table.device)
        indptr = torch.arange(segments.count + 1, device=rows.device) * segments.block_length
        return cls(rows, indptr, rows)

    @classmethod
    def of(cls, rows: Tensor, segments: Segments) -> Planned:
        """These rows, int64 and ascending, whose number the host knows."""
        starts = torch.arange(segments.count + 1, device=rows.device) * segments.block_length
        order = torch.full((segments.rows,), -1, device=rows.device)
        order[rows] = torch.arange(rows.shape[0], device=rows.device)
        most = (min(segments.block_length, rows.shape[0]),) * segments.count
        return cls(rows, torch.searchsorted(rows, starts), order, most)

    @property
    def room(self) -> int:
        """n."""
        return self.rows.shape[0]


class Lists(NamedTuple):
    """Granules to read in CSR form, ordered by owner (segment, or planned row with per_row), then head.

    indptr: int64 [owners * heads + 1]; indices: int64, granule numbers in the request's prefix, sorted and unique.
    heads: G or H. granule: tokens per index. whole: bool [S], True = the segment reads its whole prefix and its lists
    are empty. most: bound on the keys that any row reads by these lists, whole prefixes included.
    """

    indptr: Tensor
    indices: Tensor
    heads: int
    granule: int
    whole: Tensor
    most: int
    per_row: bool = False


class Parts(NamedTuple):
    """Attention of planned rows, cut along the keys: float32 out [C, n, H, D] and lse [C, n, H].

    A part without keys has lse -inf and an undefined out. What lies behind the last planned row is undefined.
    """

    out: Tensor
    lse: Tensor


def check_planned(planned: Planned, segments: Segments) -> None:
    """Raise ValueError unless the shapes and dtypes fit."""
    check("rows", planned.rows, (None,), torch.int64)
    check("indptr of rows", planned.indptr, (segments.count + 1,), torch.int64)
    check("order", planned.order, (segments.rows,), torch.int64)


def check_query(q_RHD: Tensor, pages: Pages, segments: Segments) -> int:
    """Raise ValueError unless the queries fit; the number of query heads per KV head."""
    check("q", q_RHD, (segments.rows, None, pages.head_dim), *FLOATS)
    share, rest = divmod(q_RHD.shape[1], pages.kv_heads)
    if rest or not share:
        raise ValueError(f"q: found {q_RHD.shape[1]} heads, allowed: multiples of {pages.kv_heads}")
    return share
