"""Later denoising steps as recorded graphs: made once for a size, run again with other numbers.

A step of a big model is a thousand launches, and for a few requests the host takes longer to make them than the device
to run them. A recording runs them all at once, but always on the same tensors and with what the host said when it was
made. So a recording belongs to a bucket: so many segments at most, with prefixes and budgets of so many tokens at most;
whatever varies below that lies on the device, and is written there before each run. Places that a round leaves empty
hold padding: a block of masks behind an empty prefix, in a slot that no request has.

Rounds that do anything else (first steps, prefill, commits, scores, several methods, methods whose host decides as they
go, prefixes within the budget) are none of this room's business: it says so and they run as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.core.batch import ActiveRule, ForwardBatch, ForwardMode, SparseParams
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.core.work import Ids, WorkItem
from losa_runtime.models.model import BlockDiffusionModel
from losa_runtime.sparse.attend import SparseAttend
from losa_runtime.sparse.method import SparseMethod
from losa_runtime.sparse.step import most_active

logger = logging.getLogger(__name__)

LEAST_PREFIX = 1024  # tokens; smaller buckets would save nothing
PARTS = 2  # along the keys, of the attention of as many rows as fill a device; fewer rows in more parts take no more
GRAPH_ROOM = 256 << 20  # for the graphs themselves, a few MiB each
PATIENCE = 3
MOST_KNOWN = 64


class Recording(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Run it again on what its tensors hold now. May return before it has run."""


class Recorder(Protocol):
    """Makes recordings. Knows a device; knows nothing of what is recorded."""

    def record(self, run: Callable[[], None]) -> Recording:
        """Run `run` at least once, for whatever is made on first use, and then record it."""


class Bucket(NamedTuple):
    """The rounds that one recording serves. prefix, budget: most tokens of any segment; active: most rows of any that
    are recomputed, where the method has a rule for it."""

    method: str
    options: BaseModel
    segments: int
    prefix: int
    budget: int
    active: int


class Replayed(NamedTuple):
    """A round and padding behind it. hidden_TC: valid until the next run. attend: tells what was read."""

    batch: ForwardBatch
    hidden_TC: Tensor
    attend: SparseAttend


@dataclass(eq=False)
class _Graph:
    batch: ForwardBatch
    attend: SparseAttend
    recording: Recording | None = None
    hidden_TC: Tensor | None = None


@dataclass(eq=False)
class _Known:
    """A bucket that was wanted."""

    wishes: int = 0
    graph: _Graph | None = None


class DenoiseGraphs:
    """The recordings of one runner, each made when it has been wanted several times.

    tensors: makes a batch of work items. spare_slot: of method state, for padding. most: segments of the largest
    bucket. patience: wishes before a recording is made, since that takes as long as some steps. There are never more
    than MOST_KNOWN: requests choose options, and must not fill the memory with them.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        backend: AttentionBackend,
        methods: Mapping[str, SparseMethod],
        tensors: Callable[[Sequence[WorkItem]], ForwardBatch],
        recorder: Recorder,
        spare_slot: int,
        most: int,
        patience: int = PATIENCE,
    ) -> None:
        assert backend.recordable and most > 0
        self._model, self._backend, self._methods = model, backend, methods
        self._tensors, self._recorder, self._spare, self.most = tensors, recorder, spare_slot, most
        self._patience = patience
        self._known: dict[Bucket, _Known] = {}  # the one wanted last comes last
        self.runs = 0

    @property
    def recorded(self) -> tuple[Bucket, ...]:
        """What there is a recording for, the one wanted last at the end."""
        return tuple(bucket for bucket, known in self._known.items() if known.graph is not None)

    def run(self, items: Sequence[WorkItem]) -> Replayed | None:
        """The round by a recording, or None if there is none of it."""
        bucket = self._bucket(items)
        graph = None if bucket is None else self._wanted(bucket)
        if bucket is None or graph is None:
            return None
        batch, attend = self._load(graph, bucket, items)
        assert graph.recording is not None and graph.hidden_TC is not None
        graph.recording.replay()
        self.runs += 1
        attend.count_like(graph.attend)
        return Replayed(batch, graph.hidden_TC, attend)

    def _wanted(self, bucket: Bucket) -> _Graph | None:
        """The recording for a bucket, if there is one now."""
        known = self._known.pop(bucket) if bucket in self._known else _Known()
        self._known[bucket] = known
        if len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        known.wishes += 1
        if known.wishes == self._patience:
            try:
                known.graph = self._record(bucket)
            except Exception:  # nothing of any request was touched, and the step can be run as ever
                logger.exception("later steps of %s could not be recorded; they run eagerly", bucket)
        return known.graph

    def _bucket(self, items: Sequence[WorkItem]) -> Bucket | None:
        sparse = [item.sparse for item in items if item.mode is ForwardMode.DENOISE and item.sparse is not None]
        if not sparse or len(sparse) != len(items) or len(items) > self.most:
            return None
        name, options = sparse[0].method, sparse[0].options
        method = self._methods[name]
        if any((p.method, p.options) != (name, options) for p in sparse) or not method.recordable(options):
            return None
        starts, budgets = [item.start for item in items], [0]
        if method.has_budget:
            budgets = [method.budget(p, start) for p, start in zip(sparse, starts, strict=True)]
            if any(start <= budget for start, budget in zip(starts, budgets, strict=True)):
                return None
        block = self._model.config.block_length
        active = max(most_active(p.active, block) for p in sparse) if method.has_active_rows else block
        page = self._backend.pool.page_size
        unit = max(page, block)
        prefix = unit * _power_of_two(-(-max(LEAST_PREFIX, *starts) // unit))
        # Bounds in few sizes; that of the budget must not cover the bound of the prefix.
        budget = min(page * _power_of_two(-(-max(budgets) // page)), prefix - page) if method.has_budget else 0
        active = min(block, _power_of_two(active)) if active else 0
        return Bucket(name, options, min(self.most, _power_of_two(len(items))), prefix, budget, active)

    def _record(self, bucket: Bucket) -> _Graph:
        """Made on padding alone: it runs, but reads and writes nothing that is anybody's."""
        began = time.perf_counter()
        pages = np.zeros(-(-bucket.prefix // self._backend.pool.page_size), dtype=np.int64)
        bounds = [self._padding(bucket, pages, bucket.prefix, ActiveRule("count", bucket.active))] * bucket.segments
        batch = self._tensors(bounds)
        graph = _Graph(batch, SparseAttend(self._backend, self._methods, batch))

        def run() -> None:
            graph.attend.recount()
            graph.hidden_TC = self._model(graph.batch.tokens_T, graph.batch.positions_T, graph.attend)

        self._load(graph, bucket, [])
        graph.recording = self._recorder.record(run)
        logger.info(
            "recorded later steps of %s for %d requests with prefixes of up to %d tokens in %.2f s",
            *(bucket.method, bucket.segments, bucket.prefix, time.perf_counter() - began),
        )
        return graph

    def _load(self, graph: _Graph, bucket: Bucket, items: Sequence[WorkItem]) -> tuple[ForwardBatch, SparseAttend]:
        """Write what the host says of these segments, and padding behind them, to the tensors of the recording."""
        width = -(-bucket.prefix // self._backend.pool.page_size)
        padded = [item._replace(pages=np.pad(item.pages, (0, width - item.pages.size))) for item in items]
        padding = self._padding(bucket, np.zeros(width, dtype=np.int64), 0, ActiveRule("count", 0))
        batch = self._tensors([*padded, *[padding] * (bucket.segments - len(items))])
        attend = SparseAttend(self._backend, self._methods, batch)
        graph.batch.tokens_T.copy_(batch.tokens_T)
        graph.batch.positions_T.copy_(batch.positions_T)
        graph.attend.refresh(attend)
        return batch, attend

    def _padding(self, bucket: Bucket, pages: Ids, start: int, active: ActiveRule) -> WorkItem:
        config = self._model.config
        return WorkItem(
            mode=ForwardMode.DENOISE,
            tokens=np.full(config.block_length, config.mask_token_id, dtype=np.int64),
            start=start,
            pages=pages,
            slot=self._spare,
            step=1,
            candidates=np.empty(0, dtype=np.int64),
            sparse=SparseParams(bucket.method, bucket.budget, active, bucket.options, config.block_length),
        )


def recording_bytes(model: ModelConfig, context_pages: int, most: int, itemsize: int) -> int:
    """Memory kept free for recordings: what the largest step needs at once, as they share it, and room for the graphs.

    itemsize: bytes of an activation's number.
    """
    rows = most * model.block_length
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    activations = rows * (4 * model.hidden_size + 3 * model.widest_hidden + 4 * heads) * itemsize
    scores = rows * model.num_kv_heads * context_pages * (4 + 1)
    states = PARTS * rows * model.num_heads * (model.head_dim + 1) * 4
    return activations + scores + states + GRAPH_ROOM


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
