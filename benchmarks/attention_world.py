"""Layers with real pages, real methods and a real backend, but no model: where the attention benchmark takes place.

Every request has a prefix of made-up keys; its pages lie scattered in the pool. Forwards are put together as the
runner does it, and what is timed is the call that a model would make for its second layer: the first one also makes
what all layers use. Both layers hold the same numbers in memory of their own, so that no layer finds its K/V in a
cache. Knows no variant and prints nothing.
N prefix positions, B block length, G KV heads, H query heads, D head dim, T denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import attention_data as data
from benchmarks.attention_clock import clock_for
from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.attention.registry import make_backend
from losa_runtime.cache import host_memory
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ActiveRule, ForwardBatch, ForwardMode, Segment, SparseParams
from losa_runtime.sparse.attend import SparseAttend
from losa_runtime.sparse.density import SegmentReport
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import SparseMethod, declared_summaries, make_methods, method_class

LAYERS = 2

# Calls of a backend by the part of a step that they belong to; what is left over is host work.
PARTS = {
    "changed_rows": "change",
    "select_pages": "selection",
    "kv_scores": "selection",
    "prefix_mass": "selection",
    "prefix": "attention",
    "prefill": "attention",
    "store_kv": "store",
    "block_merged": "block+merge",
}


@dataclass(frozen=True)
class Setting:
    """What is measured. backends: those that variants may name, the usual one first."""

    context: int
    batch: int
    block: int
    heads: int
    kv_heads: int
    dim: int
    page: int
    budget: int
    active: int
    dtype: torch.dtype
    device: torch.device
    backends: tuple[str, ...]
    steps: int = 16
    seed: int = 0

    @property
    def sizes(self) -> data.Sizes:
        """Sizes of a block's queries."""
        return data.Sizes(self.block, self.heads, self.kv_heads, self.dim)


class Forward(NamedTuple):
    """One call of the attention: its seconds, by part and in all; host: until the host had asked for all of it.
    reports: what all layers read."""

    seconds: float
    parts: dict[str, float]
    host: float
    reports: tuple[SegmentReport, ...]


class World:
    """Requests with stored prefixes. Blocks begin at N, and at N + B where a finished block is committed first."""

    def __init__(self, setting: Setting, slots: int, methods: Collection[str]) -> None:
        self.setting = s = setting
        self._rng = torch.Generator(s.device).manual_seed(s.seed)
        room = -(-(s.context + 2 * s.block) // s.page)
        summaries = declared_summaries(methods) | {Summary.KEY_BOUNDS}
        self.pool = KVPool(LAYERS, s.batch * room, s.kv_heads, s.page, s.dim, s.dtype, s.device, summaries)
        # What a model gives: on a CPU it computes in float32 whatever the pages hold.
        self._given = torch.float32 if s.device.type == "cpu" else s.dtype
        config = BackendConfig(s.device, self._given, s.dtype, s.heads, s.kv_heads, s.dim, s.page, s.block)
        self.clock = clock_for(s.device)
        self._backends = {name: make_backend(name, config, self.pool) for name in s.backends}
        for backend in self._backends.values():
            self._watch(backend)
        geometry = Geometry(LAYERS, s.heads, s.kv_heads, s.dim, s.block, s.page, slots, room * s.page, s.device)
        self.methods: dict[str, SparseMethod] = make_methods(geometry, methods)
        tables = torch.randperm(s.batch * room, generator=torch.Generator().manual_seed(s.seed))
        self._tables = tables.view(s.batch, room).to(s.device)
        shape = (s.batch, s.kv_heads, s.context + s.block, s.dim)
        # Only torch's attention wants them, which is the yardstick on a CPU.
        self.contiguous = tuple(host_memory.zeros(shape, s.dtype) for _ in range(2)) if s.device.type == "cpu" else ()
        for request in range(s.batch):
            self._fill(request)
        self._copy_layer()
        self._block_kv = self._noise(2, 2 * s.batch * s.block, s.kv_heads, s.dim).to(self._given)

    @property
    def choice(self) -> data.Choice:
        """How the rows of the first request select."""
        pages = self._tables[0, : self.setting.context // self.setting.page]
        bounds = self.pool.summary(0, Summary.KEY_BOUNDS)[pages].float()
        return data.Choice(bounds, self.setting.budget // self.setting.page)

    def params(self, method: str, options: dict[str, Any]) -> SparseParams:
        """Settled parameters of a request."""
        s = self.setting
        rule = ActiveRule("count", s.active)
        return SparseParams(method, s.budget, rule, method_class(method).Options(**options), s.steps)

    def forward(
        self,
        q_SBHD: Tensor,
        modes: tuple[ForwardMode, ...],
        start: int,
        slot: int,
        step: int,
        params: SparseParams,
        backend: str | None = None,
    ) -> Forward:
        """One forward of the first requests: for each of `modes` a segment per request, stores first.

        q_SBHD: a block of queries per segment. start: first position of the block, or of the stored one where `modes`
        has a commit. slot: the first request's. backend: None = the usual one.
        """
        batch = self._batch(q_SBHD.shape[0] // len(modes), modes, start, slot, step, params)
        rows = q_SBHD.flatten(0, 1).to(self._given)
        attend = SparseAttend(self._backends[backend or self.setting.backends[0]], self.methods, batch)
        k, v = (kind[: rows.shape[0]] for kind in self._block_kv)
        attend(0, rows, k, v)
        timing = self.clock.measure(lambda: attend(1, rows, k, v))
        return Forward(*timing, attend.report())

    def sdpa(self, q_SBHD: Tensor) -> float:
        """Seconds of torch's attention over contiguous K/V of prefix and block, grouped heads folded into rows."""
        s, count = self.setting, q_SBHD.shape[0]
        keys, values = (kind[:count] for kind in self.contiguous)
        began = time.perf_counter()
        q = q_SBHD.to(s.dtype).view(count, s.block, s.kv_heads, -1, s.dim).transpose(1, 2).flatten(2, 3)
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
        out.view(count, s.kv_heads, s.block, -1, s.dim).transpose(1, 2).reshape(q_SBHD.shape)
        return time.perf_counter() - began

    def release(self, slot: int, count: int) -> None:
        """The blocks in these slots have ended."""
        for method in self.methods.values():
            for each in range(slot, slot + count):
                method.release(each)

    def _batch(
        self, requests: int, modes: tuple[ForwardMode, ...], start: int, slot: int, step: int, params: SparseParams
    ) -> ForwardBatch:
        s = self.setting
        segments: list[Segment] = []
        locations = [torch.empty(0, dtype=torch.int64, device=s.device)]
        for mode in modes:
            begin = start + s.block if modes[0].stores and not mode.stores else start
            for request in range(requests):
                row, pages = len(segments) * s.block, self._tables[request]
                place = (-1, 0, None) if mode.stores else (slot + request, step, params)
                segments.append(Segment(mode, row, row + s.block, begin, pages, *place))
                if mode.stores:
                    locations.append(self._locations(request, begin, s.block))
        empty = torch.zeros(len(segments) * s.block, dtype=torch.int64, device=s.device)
        return ForwardBatch(empty, empty, tuple(segments), torch.cat(locations), s.block)

    def _locations(self, request: int, start: int, count: int) -> Tensor:
        at = torch.arange(start, start + count, device=self.setting.device)
        return self._tables[request][at // self.setting.page] * self.setting.page + at % self.setting.page

    def _fill(self, request: int) -> None:
        """Store a request's prefix, in pieces, in the pages and in contiguous memory; and the block's own K/V there."""
        s = self.setting
        length = s.context + s.block
        for start in range(0, length, 8192):
            count = min(8192, length - start)
            k = data.keys(count, s.kv_heads, s.dim, s.page, self._rng)
            v = self._noise(*k.shape)
            k, v = k.to(self._given), v.to(self._given)
            first = next(iter(self._backends.values()))
            first.store_kv(0, k, v, self._locations(request, start, count))
            for kept, rows in zip(self.contiguous, (k, v), strict=False):
                kept[request, :, start : start + count] = rows.transpose(0, 1)

    def _copy_layer(self) -> None:
        for kept in (self.pool.k, self.pool.v):
            kept(1).copy_(kept(0))
        for kind in self.pool.summaries:
            self.pool.summary(1, kind).copy_(self.pool.summary(0, kind))

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._rng, device=self.setting.device)

    def _watch(self, backend: AttentionBackend) -> None:
        for name, part in PARTS.items():
            setattr(backend, name, self._timed(getattr(backend, name), part))

    def _timed(self, call: Any, part: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.part(part):
                return call(*args, **kwargs)

        return timed
