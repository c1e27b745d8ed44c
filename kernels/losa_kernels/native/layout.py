"""What the kernels are told of pages, segments and queries: checked tensors, kept alive beside their C structures.

S segments, R rows, H query heads, G KV heads, D head dim, P pages of the pool.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.native.library import DTYPES, MAX_HEAD_DIM, CGroup, CPool, CQuery


def check(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> Tensor:
    """`x` if it lies on the CPU in one piece and has this shape (None: any) and one of the dtypes, else ValueError."""
    fits = x.ndim == len(shape) and all(want is None or want == got for want, got in zip(shape, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: found shape {list(x.shape)}, allowed: [{wanted}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: found {x.dtype}, allowed: {', '.join(map(str, dtypes))}")
    if x.device.type != "cpu" or not x.is_contiguous():
        kind = "contiguous" if x.is_contiguous() else "not contiguous"
        raise ValueError(f"{name}: found a {kind} tensor on {x.device}, allowed: contiguous on cpu")
    return x


class Pages:
    """One layer of a page pool: k, v [P, G, page_size, D]; bounds, moments [P, G, 2, D] or None. Lives as long as they.

    Bounds have the dtype of k, maximum first; moments are float32, mean first, then mean squared deviation.
    """

    def __init__(self, k: Tensor, v: Tensor, bounds: Tensor | None = None, moments: Tensor | None = None) -> None:
        check("k", k, (None, None, None, None), *DTYPES)
        pages, kv_heads, page_size, dim = k.shape
        check("v", v, tuple(k.shape), k.dtype)
        if bounds is not None:
            check("bounds", bounds, (pages, kv_heads, 2, dim), k.dtype)
        if moments is not None:
            check("moments", moments, (pages, kv_heads, 2, dim), torch.float32)
        if not 0 < dim <= MAX_HEAD_DIM:
            raise ValueError(f"k: found head dim {dim}, allowed: 1 to {MAX_HEAD_DIM}")
        self.k, self.v, self.bounds, self.moments = k, v, bounds, moments
        self.kv_heads, self.page_size, self.head_dim = kv_heads, page_size, dim
        at = (None if x is None else x.data_ptr() for x in (k, v, bounds, moments))
        self.c = CPool(pages, kv_heads, page_size, dim, DTYPES[k.dtype], *at)


class Segments:
    """Segments and their page tables, one after another.

    table_indptr: int64 [S + 1] into table, int64; prefix_lens: int64 [S]. Page ids are checked by the kernels.
    """

    def __init__(self, table_indptr: Tensor, table: Tensor, prefix_lens: Tensor, block_length: int) -> None:
        count = prefix_lens.shape[0]
        check("prefix_lens", prefix_lens, (None,), torch.int64)
        check("table_indptr", table_indptr, (count + 1,), torch.int64)
        check("table", table, (None,), torch.int64)
        ends = table_indptr.diff()
        if count == 0 or table_indptr[0] != 0 or table_indptr[-1] != table.shape[0] or bool((ends < 0).any()):
            raise ValueError(f"table_indptr: found {table_indptr.tolist()} for {table.shape[0]} pages")
        self.count, self.block_length = count, block_length
        self.tensors = (table_indptr, table, prefix_lens)
        self.prefix_lens = prefix_lens
        self.c = CGroup(count, *(x.data_ptr() for x in self.tensors), block_length)


class Query(NamedTuple):
    """Checked query rows and their C structure."""

    q: Tensor
    rows: Tensor | None
    computed: int
    heads: int
    c: CQuery


def query(q_RHD: Tensor, rows: Tensor | None, head_dim: int, scale: float = 1.0) -> Query:
    """Queries float32 [R, H, D] and the sorted rows to compute, int64 (None: all)."""
    check("q", q_RHD, (None, None, head_dim), torch.float32)
    if rows is not None:
        check("rows", rows, (None,), torch.int64)
    total, heads = q_RHD.shape[:2]
    count = total if rows is None else rows.shape[0]
    at_rows = None if rows is None or count == 0 else rows.data_ptr()
    if rows is not None and count == 0:
        # A null pointer would mean all rows; any other is never followed.
        at_rows = q_RHD.data_ptr()
    return Query(q_RHD, rows, count, heads, CQuery(q_RHD.data_ptr(), total, at_rows, count, heads, scale))


def ref(structure: ctypes.Structure) -> object:
    """A pointer to a structure, as an argument."""
    return ctypes.byref(structure)
