"""The meeting of model, method and backend: the attention callable that a model is handed for one forward.

Store rows are written first and attend block-causally; block rows are grouped by method and attend to what the method
chose of their prefix and to their block. Knows no model and no scheduler.
T rows of the batch, R rows of a group, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, PrefixPlan, RowGroup
from losa_runtime.core.batch import ForwardBatch, ForwardMode, Segment
from losa_runtime.sparse.density import PrefixMeter, SegmentReport
from losa_runtime.sparse.method import DenoiseStep, SparseMethod


class _Party(NamedTuple):
    """Block segments with one method. No method (and no step): scored blocks, which read densely and keep nothing."""

    group: RowGroup
    meter: PrefixMeter
    method: SparseMethod | None = None
    step: DenoiseStep | None = None


class SparseAttend:
    """Attention of one forward: `(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H, D]`, each layer once.

    methods: by name, at least those that the batch asks for. Groups are made here, once for all layers.
    """

    def __init__(self, backend: AttentionBackend, methods: Mapping[str, SparseMethod], batch: ForwardBatch) -> None:
        self._backend, self._batch = backend, batch
        length, device = batch.block_length, backend.pool.device
        stores = [segment for segment in batch.segments if segment.mode.stores]
        self._stores = RowGroup.of(stores, length, device) if stores else None
        assert self._stores is None or self._stores.where == slice(0, batch.stored), "store segments come first"
        by_method: dict[str | None, list[Segment]] = {}
        for segment in batch.segments:
            if not segment.mode.stores:
                by_method.setdefault(_method_name(segment), []).append(segment)
        self._parties = [self._party(name, some, methods) for name, some in by_method.items()]

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        if self._stores is not None:
            stored = self._batch.stored
            self._backend.store_kv(layer, k_TGD[:stored], v_TGD[:stored], self._batch.locations)
            self._stores.put(out_THD, self._backend.prefill(layer, q_THD[:stored], self._stores))
        for party in self._parties:
            q, k, v = (party.group.take(x) for x in (q_THD, k_TGD, v_TGD))
            party.group.put(out_THD, self._block_rows(layer, q, k, v, party))
        return out_THD

    def report(self) -> tuple[SegmentReport, ...]:
        """What was read so far, one entry per block segment in the order of the batch."""
        entries = [entry for party in self._parties for entry in party.meter.report()]
        return tuple(sorted(entries, key=lambda entry: entry.segment.start))

    def _party(self, name: str | None, segments: list[Segment], methods: Mapping[str, SparseMethod]) -> _Party:
        pool = self._backend.pool
        group = RowGroup.of(segments, self._batch.block_length, pool.device)
        assert all(count == group.block_length for count in group.counts), "a block segment is one block"
        if name is None:
            return _Party(group, PrefixMeter(group, (False,) * len(segments), pool))
        method, step = methods[name], DenoiseStep(group, pool.device)
        bypassed = step.whole if method.has_budget else (False,) * len(segments)
        return _Party(group, PrefixMeter(group, bypassed, pool), method, step)

    def _block_rows(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, party: _Party) -> Tensor:
        backend, group, method, step = self._backend, party.group, party.method, party.step
        if method is None or step is None:
            plan = PrefixPlan()
            prefix = backend.prefix(layer, q_RHD, plan, group)
        else:
            plan = method.plan(layer, q_RHD, step, backend)
            prefix = method.complete(layer, plan, backend.prefix(layer, q_RHD, plan, group), step)
        party.meter.add(plan)
        return backend.block_merged(prefix, q_RHD, k_RGD, v_RGD, group)


def _method_name(segment: Segment) -> str | None:
    if segment.mode is ForwardMode.SCORE:
        return None
    assert segment.sparse is not None and segment.slot >= 0, "a denoising segment needs a method and a slot"
    return segment.sparse.method
