"""Requests for the Triton kernels: stored prefixes, queries, planned rows, lists, and the reference's word on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.reference import paging
from losa_kernels.triton.layout import Lists, Pages, Planned, Segments
from tests.kernels.interpreter import DEVICE

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class World:
    """Prefixes in one layer of a pool and one block of queries each. What is not stored is NaN: reading it shows."""

    pages: Pages
    segments: Segments
    tables: list[Tensor]
    lengths: list[int]
    q: Tensor

    @property
    def block(self) -> int:
        """Rows of a segment."""
        return self.segments.block_length

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.pages.head_dim**-0.5

    def rows(self, segment: int, among: Tensor | None = None) -> Tensor:
        """The rows of a segment, or those among some rows."""
        every = torch.arange(len(self.q), device=DEVICE) if among is None else among
        return every[every // self.block == segment]

    def keys(self, segment: int) -> tuple[Tensor, Tensor]:
        """k, v [G, N, D] of a prefix."""
        length, page = self.lengths[segment], self.pages.page_size
        table = self.tables[segment][: -(-length // page)]
        k, v = (paging.gather_pages(cache, table)[:, :length] for cache in (self.pages.k, self.pages.v))
        return k, v

    def bounds(self, segment: int) -> Tensor:
        """The bounds of a prefix's pages [P, G, 2, D]."""
        assert self.pages.bounds is not None
        return self.pages.bounds[self.tables[segment]]

    def whole(self, segment: int, q: Tensor) -> State:
        """Attention to a whole prefix."""
        where = (self.tables[segment], self.lengths[segment])
        return ref.prefix_attention(q, self.pages.k, self.pages.v, *where, self.scale)

    def listed(self, segment: int, q: Tensor, lists: list[list[int]], granule: int) -> State:
        """Attention to granules, a list per KV head or query head."""
        length = self.lengths[segment]
        positions = [[p for g in one for p in range(g * granule, min(length, (g + 1) * granule))] for one in lists]
        width = max(map(len, positions))
        if not width:
            return torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:2], -torch.inf).float()
        padded = torch.tensor([one + [0] * (width - len(one)) for one in positions], device=DEVICE)
        real = torch.tensor([[True] * len(one) + [False] * (width - len(one)) for one in positions], device=DEVICE)
        where = (self.tables[segment], padded, real)
        return ref.listed_attention(q, self.pages.k, self.pages.v, *where, self.scale)

    def alone(self, segment: int) -> World:
        """One request of this world in a batch of its own."""
        tables, lengths = [self.tables[segment]], [self.lengths[segment]]
        return World(self.pages, segments_of(tables, lengths, self.block), tables, lengths, self.q[self.rows(segment)])


def segments_of(tables: list[Tensor], lengths: list[int], block: int) -> Segments:
    """Segments with these page tables."""
    ends = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
    device = [x.to(DEVICE) for x in (ends, torch.cat(tables), torch.tensor(lengths))]
    return Segments(device[0], device[1], device[2], block, max(lengths))


def make_world(
    lengths: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    page: int = 16,
    block: int = 8,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    quantum: float | None = None,
) -> World:
    """quantum: queries and keys are small multiples of it, so that sums are exact and ties real."""

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape) if quantum is None else torch.randint(-4, 5, shape) * quantum
        return drawn.to(DEVICE)

    held = [-(-length // page) for length in lengths]
    tables = [table.to(DEVICE) for table in torch.randperm(sum(held) + 3)[: sum(held)].split(held)]
    shape = (sum(held) + 3, kv_heads, page, dim)
    k, v = (torch.full(shape, torch.nan, dtype=kv_dtype or dtype, device=DEVICE) for _ in range(2))
    bounds = torch.full((shape[0], kv_heads, 2, dim), torch.nan, dtype=kv_dtype or dtype, device=DEVICE)
    for table, length in zip(tables, lengths, strict=True):
        at = torch.arange(length, device=DEVICE)
        locations = table[at // page] * page + at % page
        for cache in (k, v):
            paging.store_rows(cache, draw(length, kv_heads, dim), locations)
        if length:
            touched, filled = paging.touched_pages(locations, page)
            bounds[touched] = paging.key_bounds(k[touched], filled)
    q = draw(len(lengths) * block, heads, dim).to(dtype)
    return World(Pages(k, v, bounds), segments_of(tables, lengths, block), tables, lengths, q)


def plan(world: World, rows: list[int]) -> Planned:
    """These rows, in room for all; behind them rows that do not exist."""
    total = len(world.q)
    order = torch.full((total,), -1)
    order[rows] = torch.arange(len(rows))
    counts = torch.bincount(torch.tensor(rows, dtype=torch.int64) // world.block, minlength=len(world.lengths))
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    padded = torch.tensor(rows + [1 << 40] * (total - len(rows)))
    return Planned(padded.to(DEVICE), indptr.to(DEVICE), order.to(DEVICE))


def lists_of(
    chosen: list[list[int]], heads: int, granule: int, whole: list[bool], most: int, per_row: bool = False
) -> Lists:
    """Lists in the order of owners and heads."""
    indptr = torch.tensor([0, *(len(one) for one in chosen)]).cumsum(0)
    indices = torch.tensor([index for one in chosen for index in one] + [1 << 40])
    skipped = torch.tensor(whole, device=DEVICE)
    return Lists(indptr.to(DEVICE), indices.to(DEVICE), heads, granule, skipped, most, per_row)


def found_lists(lists: Lists) -> list[list[int]]:
    """The lists as Python's."""
    ends = lists.indptr.tolist()
    return [lists.indices[a:b].tolist() for a, b in pairwise(ends)]
