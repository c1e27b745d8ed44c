"""Requests with stored prefixes before a tiny model, and a runner whose hidden states can be seen.

Two such worlds with the same seed hold the same numbers: one may run its steps by recordings, the other one as ever.
Pages that nobody has stored are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.torch_backend import TorchBackend
from losa_runtime.cache.kv_pool import KVPool
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.work import BlockResult, Round, SegmentCost, WorkItem, nothing
from losa_runtime.models.random_checkpoint import random_model
from losa_runtime.runner.graphs import Recorder
from losa_runtime.runner.model_runner import ModelRunner
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import declared_summaries, make_methods, method_class
from tests.kernels.interpreter import DEVICE
from tests.runner.tape import Tape

B, PAGE, SLOTS, CONTEXT, PAGES = 4, 8, 5, 256, 60
SPARE = SLOTS - 1
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {**SHAPE, "block_size": B, "max_position_embeddings": CONTEXT + B}
METHODS = ("dense", "quest", "losa")
ONE_ROW = ActiveRule("count", 1)


class TapeRecorder:
    """Recordings on a CPU."""

    def record(self, run: Callable[[], None]) -> Tape:
        run()
        tape = Tape()
        tape.record(run)
        return tape


class Seen(NamedTuple):
    """What a round has come to."""

    hidden_RC: Tensor
    costs: list[SegmentCost | None]


class Catcher:
    """In place of the sampler: keeps the hidden states of the segments it is asked about."""

    def __init__(self) -> None:
        self.hidden_RC = torch.empty(0)

    def __call__(self, items: Sequence[WorkItem], first_rows: Sequence[int], hidden_TC: Tensor) -> list[BlockResult]:
        rows = [row + offset for row in first_rows for offset in range(B)]
        self.hidden_RC = hidden_TC[rows].clone()
        return [nothing() for _ in items]


class StepWorld:
    """prefixes: tokens stored for each request; its slot is its number."""

    def __init__(
        self,
        prefixes: Sequence[int],
        backend: Callable[[KVPool, int], AttentionBackend],
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        head_dim: int = 16,
    ) -> None:
        self._rng = torch.Generator().manual_seed(0)
        self.model = random_model("tiny", dtype, DEVICE, num_hidden_layers=layers, head_dim=head_dim, **SIZES)
        self.prefixes = list(prefixes)
        config = self.model.config
        shape = (config.num_layers, PAGES, config.num_kv_heads, PAGE, config.head_dim, dtype, DEVICE)
        self.pool = KVPool(*shape, declared_summaries(METHODS))
        for layer in range(config.num_layers):
            kept = [self.pool.k(layer), self.pool.v(layer), *(self.pool.summary(layer, x) for x in self.pool.summaries)]
            for each in kept:
                each.fill_(float("nan"))
        order = torch.randperm(PAGES, generator=self._rng).split(PAGES // SLOTS)
        self.tables = [table.numpy() for table in order]
        for request, length in enumerate(self.prefixes):
            self.store(request, 0, length)
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        geometry = Geometry(config.num_layers, *heads, B, PAGE, SLOTS, CONTEXT, DEVICE)
        self.methods = make_methods(geometry, METHODS)
        self.catcher = Catcher()
        made: Any = self.catcher
        self.runner = ModelRunner(self.model, backend(self.pool, config.num_heads), self.methods, made, DEVICE)

    def store(self, request: int, start: int, stop: int) -> None:
        """Noise for some positions of a request."""
        at = torch.arange(start, stop)
        table = torch.from_numpy(self.tables[request])
        locations = (table[at // PAGE] * PAGE + at % PAGE).to(DEVICE)
        reference = TorchBackend(self.pool, self.model.config.num_heads)
        for layer in range(self.pool.num_layers):
            shape = (2, stop - start, self.pool.num_kv_heads, self.pool.head_dim)
            k, v = torch.randn(shape, generator=self._rng).to(self.pool.dtype).to(DEVICE)
            reference.store_kv(layer, k, v, locations)
        self.prefixes[request] = stop

    def grow(self, request: int, tokens: int) -> None:
        """A request has stored some blocks more; its current block is over."""
        self.store(request, self.prefixes[request], self.prefixes[request] + tokens)
        self.runner.release([request])

    def item(self, request: int, step: int, params: SparseParams) -> WorkItem:
        """A step of a request's block behind its prefix; its tokens are a function of request and step."""
        start = self.prefixes[request]
        tokens = np.random.default_rng(100 * request + step).integers(0, 256, B)
        return WorkItem(
            mode=ForwardMode.DENOISE if step else ForwardMode.OPEN,
            tokens=tokens,
            start=start,
            pages=self.tables[request][: -(-start // PAGE)],
            slot=request,
            step=step,
            candidates=np.arange(B),
            sparse=params,
        )

    def run(self, items: Sequence[WorkItem]) -> Seen:
        """One round."""
        results = self.runner.run(Round(tuple(items), ()))
        return Seen(self.catcher.hidden_RC, [result.cost for result in results])

    def states(self) -> list[Tensor]:
        """All that methods remember, but for the slot of the padding."""
        memory = next(iter(self.methods.values())).memory
        kept = [*(memory.prefix._tensors or ()), memory._queries._query]
        return [x[:, : SPARE * B].clone() for x in kept if x is not None]


def params(method: str, budget: int = 16, rule: ActiveRule = ONE_ROW, **options: Any) -> SparseParams:
    """Settled parameters."""
    return SparseParams(method, budget, rule, method_class(method).Options(**options), B)


PREFIXES = (60, 44, 28, 84)
Asked = Sequence[tuple[int, SparseParams]]  # requests and their parameters
Pair = tuple[StepWorld, StepWorld]  # one that records, one that does not


def make_pair(recorder: Recorder, backend: Callable[[KVPool, int], AttentionBackend], *about: Any, **more: Any) -> Pair:
    """Both with the same numbers."""
    recording, eager = (StepWorld(PREFIXES, backend, *about, **more) for _ in range(2))
    recording.runner.record_steps(recorder, SPARE, most=4, patience=1)
    return recording, eager


def play(worlds: Pair, step: int, asked: Asked, tolerance: float = 1e-5) -> None:
    """One round in both, compared."""
    got, want = (world.run([world.item(request, step, about) for request, about in asked]) for world in worlds)
    torch.testing.assert_close(got.hidden_RC, want.hidden_RC, rtol=10 * tolerance, atol=tolerance)
    assert got.costs == want.costs


def check_states(worlds: Pair, tolerance: float = 1e-5) -> None:
    """All that methods remember, and the pages."""
    for got, want in zip(*(world.states() for world in worlds), strict=True):
        torch.testing.assert_close(got, want, rtol=10 * tolerance, atol=tolerance)
    for layer in range(worlds[0].pool.num_layers):
        for got, want in zip(*((w.pool.k(layer), w.pool.v(layer)) for w in worlds), strict=True):
            torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)


def recorded(worlds: Pair) -> list[tuple[str, int, int, int]]:
    """Method, segments, prefix tokens and rows per segment of each recording."""
    found = worlds[0].runner.graphs
    assert found is not None
    return [(bucket.method, bucket.segments, bucket.prefix, bucket.active) for bucket in found.recorded]
