"""Runs one round: ragged tensors from work items, one forward, decisions per block segment.

The only room that knows model, methods, backend and decoding at once. Knows no queue and no page allocation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.cache.transfer import vectors_to_device
from losa_runtime.core.batch import ForwardBatch, ForwardMode, Segment
from losa_runtime.core.work import BlockResult, Round, SegmentCost, WorkItem, nothing
from losa_runtime.models.model import BlockDiffusionModel
from losa_runtime.runner.graphs import PATIENCE, DenoiseGraphs, Recorder
from losa_runtime.runner.unmask import Unmasker
from losa_runtime.sparse.attend import SparseAttend
from losa_runtime.sparse.density import SegmentReport
from losa_runtime.sparse.method import SparseMethod

_BROKEN = "the model's keys and values for this request are not finite; the request was ended"


class Launched(NamedTuple):
    """A forward that may still be running. wait: its results, one per segment in order; to be called once, and before
    the next launch. Raises what the forward or the sampling has raised."""

    work: Round
    wait: Callable[[], list[BlockResult]]


class ModelRunner:
    """A model with its attention backend (which holds the page pool), its sparse methods and its sampler.

    forward_s: seconds in which a forward ran, from the model's call until its decisions were known.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        backend: AttentionBackend,
        methods: Mapping[str, SparseMethod],
        unmasker: Unmasker,
        device: torch.device,
    ) -> None:
        self.model, self.backend, self.methods = model, backend, methods
        self._unmasker, self._device = unmasker, device
        self.graphs: DenoiseGraphs | None = None
        self.forward_s = 0.0

    def record_steps(self, recorder: Recorder, spare_slot: int, most: int, patience: int = PATIENCE) -> None:
        """From now on run later steps of up to `most` segments by recordings, where there can be any. See there."""
        about = (self.model, self.backend, self.methods, self.tensors)
        self.graphs = DenoiseGraphs(*about, recorder, spare_slot, most, patience)

    def release(self, slots: Iterable[int]) -> None:
        """Forget the method state of these slots, whether or not there is any."""
        for slot in slots:
            for method in self.methods.values():
                method.release(slot)

    def run(self, work: Round) -> list[BlockResult]:
        """One forward over the round's segments; one result per segment, in order."""
        return self.launch(work).wait()

    @torch.inference_mode()
    def launch(self, work: Round) -> Launched:
        """The forward of a round. A device is still computing it when this returns. One at a time."""
        self.release(work.released)
        if not work.items:
            return Launched(work, list)
        began = time.perf_counter()
        replayed = None if self.graphs is None else self.graphs.run(work.items)
        if replayed is not None:
            batch, hidden_TC, attend = replayed
        else:
            batch = self.tensors(work.items)
            attend = SparseAttend(self.backend, self.methods, batch)
            began = time.perf_counter()
            hidden_TC = self.model(batch.tokens_T, batch.positions_T, attend)
        return Launched(work, lambda: self._results(work.items, batch, hidden_TC, attend, began))

    @torch.inference_mode()
    def _results(
        self, items: Sequence[WorkItem], batch: ForwardBatch, hidden_TC: Tensor, attend: SparseAttend, began: float
    ) -> list[BlockResult]:
        """What a forward has brought; the batch may hold more than was asked for behind the items. began: when.

        Sampling has to know numbers, so it waits for the device anyway.
        """
        asked = [(item, rows.start) for item, rows in zip(items, batch.segments, strict=False) if _is_asked(item)]
        answers = iter(self._unmasker([item for item, _ in asked], [row for _, row in asked], hidden_TC))
        stored = self.stored(batch, hidden_TC)
        self.forward_s += time.perf_counter() - began
        reports = attend.report()
        results = []
        for item, sound in zip(items, stored, strict=False):  # stores come first
            answer = next(answers) if _is_asked(item) else sound
            results.append(sound if sound.error is not None else answer)
        for item, report in zip(items[len(stored) :], reports, strict=False):
            answer = next(answers)
            results.append(answer if item.mode is ForwardMode.SCORE else answer._replace(cost=_cost(report)))
        return results

    def stored(self, batch: ForwardBatch, hidden_TC: Tensor) -> list[BlockResult]:
        """One result per store segment. What is no number in a row's K/V of any layer is none in its last hidden state,
        as the row attends to itself; so this finds broken K/V before anybody shares them."""
        if batch.stored == 0:
            return []
        sound_T = hidden_TC[: batch.stored].isfinite().all(-1).cpu().numpy()
        stores = [segment for segment in batch.segments if segment.mode.stores]
        return [nothing() if sound_T[s.start : s.stop].all() else nothing(_BROKEN) for s in stores]

    def tensors(self, items: Sequence[WorkItem]) -> ForwardBatch:
        """The ragged rows of a round on the device: all host values of a forward that its rows are made of, in one
        copy."""
        page_size = self.backend.pool.page_size
        positions = [np.arange(item.start, item.start + item.tokens.size) for item in items]
        stored = [(item.pages, at) for item, at in zip(items, positions, strict=True) if item.mode.stores]
        locations = [pages[at // page_size] * page_size + at % page_size for pages, at in stored]
        vectors = (
            np.concatenate([item.tokens for item in items]),
            np.concatenate(positions),
            np.concatenate([np.empty(0, dtype=np.int64), *locations]),
        )
        device_vectors = vectors_to_device([*vectors, *(item.pages for item in items)], self._device)
        tokens_T, positions_T, locations_T, *tables = device_vectors
        segments: list[Segment] = []
        row = 0
        for item, pages in zip(items, tables, strict=True):
            masked = tuple(item.candidates.tolist()) if item.candidates is not None and not item.mode.stores else None
            about = (item.slot, item.step, item.sparse, item.unmasked, masked)
            segments.append(Segment(item.mode, row, row + item.tokens.size, item.start, pages, *about))
            row += item.tokens.size
        return ForwardBatch(tokens_T, positions_T, tuple(segments), locations_T, self.model.config.block_length)


def _is_asked(item: WorkItem) -> bool:
    """Whether logits are wanted: of every block segment, and of a store segment that asks for the token behind it."""
    return not item.mode.stores or item.candidates is not None


def _cost(report: SegmentReport) -> SegmentCost:
    return SegmentCost(
        density_kv=report.kv_density,
        density_q=report.kv_density_q,
        active=report.row_shares,
        dense=report.dense,
        kv_bytes=report.kv_bytes,
        metadata_bytes=report.metadata_bytes,
        dense_bytes=report.dense_bytes,
    )
