"""A model with random weights over requests with made-up prefixes: where the decode-step benchmark takes place.

Rounds are put together as the scheduler does it and run by the real runner, sampling included: first the commit of the
block before together with a block's first step, then its later steps. The prefixes' K/V are noise, each request's own.
Knows no printing.
B block length, P pages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from losa_runtime.attention.backend import BackendConfig
from losa_runtime.attention.registry import make_backend
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.core.work import Round, RowContext, SegmentCost, WorkItem
from losa_runtime.models.random_checkpoint import random_model
from losa_runtime.runner.cuda_recorder import CudaRecorder
from losa_runtime.runner.model_runner import ModelRunner
from losa_runtime.runner.unmask import Unmasker
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import declared_summaries, make_methods, method_class

TRIES = 5
NOBODY = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Setting:
    """What is measured. blocks: of each request and method, the first is for warming up. steps: of a block. graphs:
    whether later steps are recorded as CUDA graphs, where they can be. cpu_time: count the processor's seconds, not
    the clock's."""

    preset: str
    overrides: dict[str, Any]
    context: int
    batch: int
    block: int
    steps: int
    blocks: int
    page: int
    budget: int
    active: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    methods: tuple[str, ...]
    graphs: bool
    cpu_time: bool = False
    seed: int = 0


class Step(NamedTuple):
    """One round: its seconds with everything, and what its denoising segments read."""

    first: bool
    seconds: float
    costs: tuple[SegmentCost, ...]


class World:
    """The model, the pages of all requests and the runner."""

    def __init__(self, setting: Setting) -> None:
        self.setting = s = setting
        sizes = s.overrides | {"block_size": s.block}
        # The blocks of a method lie behind the context; the next method writes over them.
        end = s.context + s.blocks * s.block
        self.model = random_model(s.preset, s.dtype, s.device, seed=s.seed, max_position_embeddings=end, **sizes)
        self.config = c = self.model.config
        room = -(-end // s.page)
        shape = (c.num_layers, s.batch * room, c.num_kv_heads, s.page, c.head_dim, s.dtype, s.device)
        self.pool = KVPool(*shape, declared_summaries(s.methods))
        self._fill()
        heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        about = BackendConfig(s.device, s.dtype, s.dtype, *heads, s.page, s.block)
        slots = s.batch + 1  # one is for the padding of recorded steps
        geometry = Geometry(c.num_layers, *heads, s.block, s.page, slots, room * s.page, s.device)
        self.runner = ModelRunner(
            self.model,
            make_backend(s.backend, about, self.pool),
            make_methods(geometry, s.methods),
            Unmasker(self.model, c.mask_token_id, c.vocab_size, s.block),
            s.device,
        )
        if s.graphs and self.runner.backend.recordable:
            self.runner.record_steps(CudaRecorder(s.device), s.batch, s.batch, patience=1)
        order = np.random.default_rng(s.seed).permutation(s.batch * room)
        self._clock = time.process_time if s.cpu_time else time.perf_counter
        self._tables = order.reshape(s.batch, room).astype(np.int64)

    @property
    def weight_bytes(self) -> int:
        """What every step reads of the model: all but the embedding, of which it reads a few rows."""
        embedding = 0 if self.config.tie_word_embeddings else self.config.vocab_size * self.config.hidden_size
        return (sum(p.numel() for p in self.model.parameters()) - embedding) * self.setting.dtype.itemsize

    def without_attention(self) -> float:
        """Seconds of a later step in which attention costs nothing: layers and logits alone, the least of a few."""
        s = self.setting
        rows = s.batch * s.block
        tokens = torch.full((rows,), self.config.mask_token_id, device=s.device)
        positions = torch.arange(s.context, s.context + s.block, device=s.device).repeat(s.batch)

        def once() -> float:
            self._wait()
            began = self._clock()
            with torch.inference_mode():
                hidden = self.model(tokens, positions, lambda layer, q, k, v: q)
                self.model.logits(hidden)
            self._wait()
            return self._clock() - began

        return min(once() for _ in range(TRIES))

    def flops(self) -> tuple[float, float]:
        """Of a step: in linear layers with all logits, and in dense attention."""
        s, c = self.setting, self.config
        rows = s.batch * s.block
        head = c.vocab_size * c.hidden_size
        weights = self.weight_bytes / s.dtype.itemsize - head
        attention = 4.0 * rows * s.context * c.num_heads * c.head_dim * c.num_layers
        return 2.0 * rows * (weights + head), attention

    def play(self, method: str) -> list[list[Step]]:
        """The steps of each block of all requests, side by side."""
        s = self.setting
        active, options = ActiveRule("count", s.active), method_class(method).Options()
        params = SparseParams(method, s.budget, active, options, s.steps)
        mask = self.config.mask_token_id
        tokens: list[np.ndarray] = []
        played: list[list[Step]] = []
        for number in range(s.blocks):
            start = s.context + number * s.block
            commits = [self._commit(r, start - s.block, done) for r, done in enumerate(tokens)]
            tokens = [np.full(s.block, mask, dtype=np.int64) for _ in range(s.batch)]
            steps: list[Step] = []
            while any((each == mask).any() for each in tokens):
                blocks = [self._block(r, start, each, len(steps), params) for r, each in enumerate(tokens)]
                steps.append(self._run([*commits, *blocks], tokens))
                commits = []
            played.append(steps)
        self.runner.run(Round((), tuple(range(s.batch))))
        return played

    def _run(self, items: Sequence[WorkItem], tokens: list[np.ndarray]) -> Step:
        """One round; its accepted tokens are written."""
        work = Round(tuple(items), ())
        self._wait()
        began = self._clock()
        results = self.runner.run(work)
        self._wait()
        seconds = self._clock() - began
        found = [result for result in results if result.cost is not None]
        assert len(found) == len(tokens) and not any(result.error for result in results)
        for each, result in zip(tokens, found, strict=True):
            each[result.offsets] = result.tokens
        first = any(item.mode is ForwardMode.OPEN for item in items)
        return Step(first, seconds, tuple(result.cost for result in found if result.cost is not None))

    def _commit(self, request: int, start: int, tokens: np.ndarray) -> WorkItem:
        return WorkItem(ForwardMode.COMMIT, tokens, start, self._table(request, start + tokens.size))

    def _block(self, request: int, start: int, tokens: np.ndarray, step: int, params: SparseParams) -> WorkItem:
        left = np.flatnonzero(tokens == self.config.mask_token_id)
        return WorkItem(
            mode=ForwardMode.DENOISE if step else ForwardMode.OPEN,
            tokens=tokens.copy(),
            start=start,
            pages=self._table(request, start),
            slot=request,
            step=step,
            candidates=left,
            sparse=params,
            decoding=DecodingParams("low_confidence_static", 0.9, self.setting.steps),
            context=RowContext(SamplingParams(temperature=0.0), request, (), (), 0, NOBODY, NOBODY),
            unmasked=tokens.size - left.size,
        )

    def _table(self, request: int, tokens: int) -> np.ndarray:
        return self._tables[request, : -(-tokens // self.setting.page)]

    def _fill(self) -> None:
        """Noise in all pages, and the bounds that go with it."""
        generator = torch.Generator(self.setting.device).manual_seed(self.setting.seed)
        for layer in range(self.pool.num_layers):
            for cache in (self.pool.k(layer), self.pool.v(layer)):
                cache.normal_(generator=generator)
            if Summary.KEY_BOUNDS in self.pool.summaries:
                keys = self.pool.k(layer)
                torch.stack((keys.amax(2), keys.amin(2)), dim=2, out=self.pool.summary(layer, Summary.KEY_BOUNDS))

    def _wait(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)
