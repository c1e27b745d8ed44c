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

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState, RenewedStates, RowGroup
from losa_runtime.core.batch import ForwardBatch, ForwardMode, Segment, SparseParams
from losa_runtime.sparse.density import PrefixMeter, SegmentReport
from losa_runtime.sparse.method import SparseMethod
from losa_runtime.sparse.step import DenoiseStep


class _Party(NamedTuple):
    """Block segments with one method and its options. None: scored blocks, which read densely and keep nothing."""

    group: RowGroup
    meter: PrefixMeter
    work: tuple[SparseMethod, DenoiseStep] | None = None


def _on_grid(segment: Segment, block_length: int) -> bool:
    """Whether a segment's blocks are counted from position 0."""
    return segment.prefix_len % block_length == 0 and (segment.stop - segment.start) % block_length == 0


class SparseAttend:
    """Attention of one forward: `(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H, D]`, each layer once.

    methods: by name, at least those that the batch asks for. Groups are made here, once for all layers.
    """

    def __init__(self, backend: AttentionBackend, methods: Mapping[str, SparseMethod], batch: ForwardBatch) -> None:
        self._backend, self._batch = backend, batch
        length, device = batch.block_length, backend.pool.device
        stores = [segment for segment in batch.segments if segment.mode.stores]
        assert all(segment.stop <= batch.stored for segment in stores), "store segments come first"
        runs = [segment for segment in stores if _on_grid(segment, length)]
        self._stores = RowGroup.of(runs, length, device) if runs else None
        by_length: dict[int, list[Segment]] = {}
        for segment in stores:
            if not _on_grid(segment, length):
                by_length.setdefault(segment.stop - segment.start, []).append(segment)
        # Kernels for runs of blocks count them from position 0; a single block can lie anywhere.
        self._single = [RowGroup.of(some, count, device) for count, some in by_length.items()]
        by_method: dict[object, list[Segment]] = {}
        for segment in batch.segments:
            if not segment.mode.stores:
                sparse = _sparse(segment)
                # Only a scored block may be a shorter one.
                key = segment.stop - segment.start if sparse is None else (sparse.method, sparse.options)
                by_method.setdefault(key, []).append(segment)
        self._parties = [self._party(some, methods) for some in by_method.values()]
        for group in (self._stores, *(party.group for party in self._parties)):
            if group is not None:
                backend.prepare(group)

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        if (stored := self._batch.stored) > 0:
            self._backend.store_kv(layer, k_TGD[:stored], v_TGD[:stored], self._batch.locations)
        if self._stores is not None:
            self._stores.put(out_THD, self._backend.prefill(layer, self._stores.take(q_THD), self._stores))
        for group in self._single:
            q, k, v = (group.take(x) for x in (q_THD, k_TGD, v_TGD))
            prefix = self._backend.prefix(layer, q, PrefixPlan(), group)
            group.put(out_THD, self._backend.block_merged(prefix, q, k, v, group))
        for party in self._parties:
            q, k, v = (party.group.take(x) for x in (q_THD, k_TGD, v_TGD))
            party.group.put(out_THD, self._block_rows(layer, q, k, v, party))
        return out_THD

    def refresh(self, fresh: SparseAttend) -> None:
        """Write to the tensors that were made for this batch what they hold for another one of the same shape: a
        recording of this forward then computes that one. What the host alone knows stays as it was.
        """
        for mine, theirs in zip(self._parties, fresh._parties, strict=True):
            self._backend.refresh(mine.group, theirs.group)
            if mine.work is not None and theirs.work is not None:
                mine.work[1].refresh(theirs.work[1])

    def recount(self) -> None:
        """Forget what was read so far."""
        for party in self._parties:
            party.meter.restart()

    def count_like(self, recorded: SparseAttend) -> None:
        """Count what a recording of that forward, refreshed with this one, has just read. To be reported before it is
        run again."""
        for mine, theirs in zip(self._parties, recorded._parties, strict=True):
            mine.meter.adopt(theirs.meter)

    def report(self) -> tuple[SegmentReport, ...]:
        """What was read so far, one entry per block segment in the order of the batch."""
        entries = [entry for party in self._parties for entry in party.meter.report(self._backend.pool)]
        return tuple(sorted(entries, key=lambda entry: entry.segment.start))

    def _party(self, segments: list[Segment], methods: Mapping[str, SparseMethod]) -> _Party:
        device = self._backend.pool.device
        sparse = _sparse(segments[0])
        length = self._batch.block_length if sparse is not None else segments[0].stop - segments[0].start
        group = RowGroup.of(segments, length, device)
        assert all(count == group.block_length for count in group.counts), "a block segment is one block"
        if sparse is None:
            return _Party(group, PrefixMeter(group, device))
        method = methods[sparse.method]
        step = DenoiseStep(group, device, method.budget if method.has_budget else None)
        return _Party(group, step.meter, (method, step))

    def _block_rows(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, party: _Party) -> Tensor:
        backend, group = self._backend, party.group
        prefix: PrefixState | RenewedStates
        if party.work is None:
            plan = PrefixPlan()
            prefix = backend.prefix(layer, q_RHD, plan, group)
        else:
            method, step = party.work
            plan = method.plan(layer, q_RHD, step, backend)
            got = backend.prefix(layer, q_RHD, plan, group)
            prefix = method.complete(layer, q_RHD, plan, got, step, backend)
        party.meter.add(plan, backend.pool)
        return backend.block_merged(prefix, q_RHD, k_RGD, v_RGD, group)


def _sparse(segment: Segment) -> SparseParams | None:
    if segment.mode is ForwardMode.SCORE:
        return None
    assert segment.sparse is not None and segment.slot >= 0, "a denoising segment needs a method and a slot"
    return segment.sparse
