"""A stage for attention without a model: requests whose queries, keys and values are random but reproducible.

The pool starts out as NaN, so whoever reads a position that nobody stored is found out. The rows of a request depend
on (name, block, step, layer) alone: not on neighbours, pages, or how a prompt is cut.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.attention.registry import make_backend
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ActiveRule, ForwardBatch, ForwardMode, Segment, SparseParams
from losa_runtime.sparse.attend import SparseAttend
from losa_runtime.sparse.density import SegmentReport
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import make_methods, method_class

DEVICE = torch.device("cpu")  # where the next stage computes; tests/gpu runs the suite on another
BACKEND = "torch"  # what it computes with; the suite runs once per backend (conftest.py)


class Sizes(NamedTuple):
    """Defaults: three query heads per KV head, one page per block."""

    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    dim: int = 16
    block: int = 8
    page: int = 8
    slots: int = 6
    pages: int = 120


class Item(NamedTuple):
    """One segment to run. start: position of its first row."""

    name: str
    mode: ForwardMode
    start: int
    count: int
    slot: int = -1
    step: int = 0
    sparse: SparseParams | None = None
    unmasked: int = 0


class Result(NamedTuple):
    """Per layer [rows, H, D], and what was read (None for stores)."""

    layers: tuple[Tensor, ...]
    report: SegmentReport | None


Rows = Callable[[Sizes, str, int, int, int], tuple[Tensor, Tensor, Tensor]]


def random_rows(sizes: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, D], k, v [B, G, D] of one block. Queries drift between steps, some rows much more than others."""

    def draw(what: str, heads: int, *key: int) -> Tensor:
        seed = zlib.crc32(repr((name, what, block, layer, *key)).encode())
        return torch.randn(sizes.block, heads, sizes.dim, generator=torch.Generator().manual_seed(seed))

    q = draw("q", sizes.heads)
    for past in range(1, step + 1):
        drift = torch.rand(sizes.block, generator=torch.Generator().manual_seed(past * 977 + block)) ** 4
        q = q + drift[:, None, None] * draw("drift", sizes.heads, past)
    return q, draw("k", sizes.kv_heads, step), draw("v", sizes.kv_heads, step)


class Stage:
    """Pool, backend and methods, and the page tables of named requests."""

    def __init__(
        self,
        sizes: Sizes | None = None,
        dtype: torch.dtype = torch.float32,
        rows: Rows = random_rows,
        seed: int = 0,
        summaries: frozenset[Summary] = frozenset(Summary),
        backend: type[AttentionBackend] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """backend, device: others than those of the suite, without asking whether the one serves the other."""
        self.sizes = s = sizes or Sizes()
        self.rows = rows
        self.device = at = DEVICE if device is None else device
        self.pool = KVPool(s.layers, s.pages, s.kv_heads, s.page, s.dim, dtype, at, summaries)
        for layer in range(s.layers):
            for tensor in (self.pool.k(layer), self.pool.v(layer)):
                tensor.fill_(torch.nan)
            for kind in self.pool.summaries:
                self.pool.summary(layer, kind).fill_(torch.nan)
        config = BackendConfig(at, torch.float32, dtype, s.heads, s.kv_heads, s.dim, s.page, s.block)
        self.backend: AttentionBackend = (
            make_backend(BACKEND, config, self.pool) if backend is None else backend(self.pool, s.heads)
        )
        self.geometry = Geometry(s.layers, s.heads, s.kv_heads, s.dim, s.block, s.page, s.slots, s.pages * s.page, at)
        self.methods = make_methods(self.geometry)
        self._free = torch.randperm(s.pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tables: dict[str, list[int]] = {}

    def table(self, name: str, tokens: int) -> Tensor:
        """The request's page table, grown to cover `tokens` positions."""
        table = self.tables.setdefault(name, [])
        while len(table) * self.sizes.page < tokens:
            table.append(self._free.pop())
        return torch.tensor(table, dtype=torch.int64, device=self.device)

    def drop(self, name: str) -> None:
        """Give the pages back; the next request takes them first, dirty as they are."""
        self._free.extend(reversed(self.tables.pop(name)))

    def forward(self, *items: Item) -> list[Result]:
        """Run the items (stores first) in one batch."""
        attend, segments = self.begin(*items)
        outs = [attend(layer, *self.inputs(items, layer)) for layer in range(self.sizes.layers)]
        blocks = [segment for segment in segments if not segment.mode.stores]
        reports = {s.start: report for s, report in zip(blocks, attend.report(), strict=True)}
        assert all(report.segment.start == start for start, report in reports.items())
        return [Result(tuple(o[s.start : s.stop].clone().cpu() for o in outs), reports.get(s.start)) for s in segments]

    def begin(self, *items: Item) -> tuple[SparseAttend, tuple[Segment, ...]]:
        """The attention of one batch before its first layer, and its segments."""
        segments, locations, row = [], [], 0
        for item in items:
            pages = self.table(item.name, item.start + (item.count if item.mode.stores else 0))
            stop = row + item.count
            about = (item.slot, item.step, item.sparse, item.unmasked)
            segments.append(Segment(item.mode, row, stop, item.start, pages, *about))
            if item.mode.stores:
                at = torch.arange(item.start, item.start + item.count, device=self.device)
                locations.append(pages[at // self.sizes.page] * self.sizes.page + at % self.sizes.page)
            row = stop
        empty = torch.zeros(row, dtype=torch.int64, device=self.device)
        where = torch.cat(locations) if locations else empty[:0]
        batch = ForwardBatch(empty, empty, tuple(segments), where, self.sizes.block)
        return SparseAttend(self.backend, self.methods, batch), batch.segments

    def prefill(self, name: str, tokens: int, start: int = 0) -> None:
        """Store the prompt in one go."""
        if tokens > start:
            self.forward(Item(name, ForwardMode.PREFILL, start, tokens - start))

    def denoise(
        self,
        name: str,
        start: int,
        sparse: SparseParams,
        steps: int = 4,
        slot: int = 0,
        unmasked: Sequence[int] | None = None,
    ) -> list[Result]:
        """All steps of one block, alone in their batches. unmasked: see `denoise_item`, one per step."""
        items = (
            denoise_item(name, start, sparse, step, slot, self.sizes, None if unmasked is None else unmasked[step])
            for step in range(steps)
        )
        return [self.forward(item)[0] for item in items]

    def inputs(self, items: Sequence[Item], layer: int) -> list[Tensor]:
        """q [T, H, D], k, v [T, G, D] of a layer."""
        length = self.sizes.block
        parts = [
            self.rows(self.sizes, item.name, (item.start + at) // length, item.step, layer)
            for item in items
            for at in range(0, item.count, length)
        ]
        return [torch.cat(kind).to(self.device) for kind in zip(*parts, strict=True)]


def denoise_item(
    name: str, start: int, sparse: SparseParams, step: int, slot: int, sizes: Sizes, unmasked: int | None = None
) -> Item:
    """OPEN for step 0, DENOISE after it. unmasked: tokens accepted before the step; None: one in each."""
    mode = ForwardMode.DENOISE if step else ForwardMode.OPEN
    return Item(name, mode, start, sizes.block, slot, step, sparse, step if unmasked is None else unmasked)


def params(
    method: str, budget: int = 16, active: float = 3, kind: str = "count", planned_steps: int = 8, **options: Any
) -> SparseParams:
    """Settled parameters without going through `resolve`. options: the method's own."""
    assert kind in ("count", "ratio", "tau")
    rule = ActiveRule(kind, active)  # type: ignore[arg-type]
    return SparseParams(method, budget, rule, method_class(method).Options(**options), planned_steps)
