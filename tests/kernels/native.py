"""The C++ kernels as tests see them: there wherever there is a compiler, at every SIMD level of this CPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, Segments
from losa_kernels.native.library import FILE, LEVELS, Kernels, NativeUnavailable
from losa_kernels.reference import attention as ref
from losa_kernels.reference import paging

each_level = pytest.mark.parametrize("level", LEVELS)


def require_native(level: str | None = None) -> Kernels:
    """The kernels. Skips only where they cannot exist: without a C++ compiler, or on a CPU without that level."""
    try:
        return Kernels(level)
    except NativeUnavailable as unavailable:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler and "this CPU offers" not in str(unavailable):
            raise
        pytest.skip(str(unavailable))


def under_another_name() -> Path:
    """The built library by a path under which nothing has been loaded yet."""
    file = Path(os.environ.get("LOSA_KERNELS") or FILE).resolve()
    return file.parent / ".." / file.parent.name / file.name


class World(NamedTuple):
    """Requests with stored prefixes in one layer of a pool, and the queries of one block each.

    Whatever is not stored is NaN, so that a kernel that reads it is found out.
    """

    pages: Pages
    segments: Segments
    tables: list[Tensor]
    lengths: list[int]
    q: Tensor
    block: int

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.pages.head_dim**-0.5

    def rows(self, segment: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computed rows of a segment: their places among the computed rows, and their places in q."""
        every = torch.arange(self.q.shape[0]) if rows is None else rows
        place = (every // self.block == segment).nonzero().flatten()
        return place, every[place]

    def alone(self, segment: int) -> World:
        """One request of this world in a batch of its own."""
        mine = slice(segment * self.block, (segment + 1) * self.block)
        table, length = self.tables[segment], self.lengths[segment]
        segments = segments_of([table], [length], self.block)
        return World(self.pages, segments, [table], [length], self.q[mine].contiguous(), self.block)

    def prefix(self, segment: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's attention to a whole prefix."""
        where = (self.tables[segment], self.lengths[segment])
        return ref.prefix_attention(q, self.pages.k, self.pages.v, *where, self.scale)


def segments_of(tables: list[Tensor], lengths: list[int], block: int) -> Segments:
    """Segments with these page tables."""
    ends = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
    return Segments(ends, torch.cat(tables), torch.tensor(lengths), block)


def make_world(
    lengths: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    page: int = 16,
    block: int = 8,
    dtype: torch.dtype = torch.float32,
    quantum: float | None = None,
) -> World:
    """quantum: queries and keys are small multiples of it, so that sums are exact and ties real."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape) if quantum is None else torch.randint(-4, 5, shape) * quantum

    held = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(held) + 3)
    tables = list(order[: sum(held)].split(held))
    shape = (len(order), kv_heads, page, dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    bounds = torch.full((len(order), kv_heads, 2, dim), torch.nan, dtype=dtype)
    for table, length in zip(tables, lengths, strict=True):
        at = torch.arange(length)
        locations = table[at // page] * page + at % page
        for cache in (k, v):
            paging.store_rows(cache, draw(length, kv_heads, dim), locations)
        if length:
            touched, filled = paging.touched_pages(locations, page)
            bounds[touched] = paging.key_bounds(k[touched], filled)
    q = draw(len(lengths) * block, heads, dim)
    return World(Pages(k, v, bounds), segments_of(tables, lengths, block), tables, lengths, q, block)
