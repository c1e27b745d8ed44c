"""Forwards of one block with many settings side by side, over a prefix that is stored once.

Goes through the engine's model, methods and backend, but not through its scheduler: which tokens stand in the block is
the caller's choice. Takes the engine's pages for itself: no request may run while a stage is in use.
S settings, B block length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.runner import Runner
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.core.batch import ForwardMode, SparseParams
from losa_runtime.core.work import WorkItem
from losa_runtime.sparse.attend import SparseAttend
from losa_runtime.sparse.density import SegmentReport

CHUNK = 2048  # prompt tokens per forward

Glass = Callable[[AttentionBackend], AttentionBackend]  # puts something in front of a backend


class Shown(NamedTuple):
    """One step of all settings. logprobs: float32 [S, B, V] of what can be sampled."""

    logprobs_SBV: Tensor
    reports: tuple[SegmentReport, ...]


class Stage:
    """An engine's parts and the pages 0 .. n of one stored prefix. Slot s belongs to setting s."""

    def __init__(self, runner: Runner) -> None:
        engine = runner.llm.engine
        assert engine.flush_cache(), "the engine has requests"  # it must not find prefixes in pages taken from it
        self._parts, self._runner = engine.parts, engine.parts.runner
        self.mask, self.block = engine.parts.model_config.mask_token_id, engine.parts.model_config.block_length
        self.layers, self.slots = engine.parts.geometry.num_layers, engine.parts.geometry.max_slots
        self._stored: list[int] = []
        pool = self._runner.backend.pool
        self._pages = np.arange(pool.num_pages, dtype=np.int64)
        self._room = pool.num_pages * pool.page_size

    @torch.inference_mode()
    def store(self, tokens: Sequence[int]) -> None:
        """Make these tokens (whole blocks) the prefix; what it shares with the last one is kept."""
        assert len(tokens) % self.block == 0 and len(tokens) <= self._room, "whole blocks that fit in the pool"
        same = _shared(self._stored, tokens) // self.block * self.block
        for start in range(same, len(tokens), CHUNK):
            part = np.array(tokens[start : start + CHUNK], dtype=np.int64)
            self._forward([WorkItem(ForwardMode.PREFILL, part, start, self._pages)], None)
        self._stored = list(tokens)

    @torch.inference_mode()
    def show(
        self,
        settings: Sequence[SparseParams],
        tokens: Sequence[int],
        step: int,
        unmasked: int,
        glass: Glass | None = None,
    ) -> Shown:
        """One denoising step of a block with these tokens behind the prefix. unmasked: tokens accepted before."""
        assert len(settings) <= self.slots, f"{len(settings)} settings, {self.slots} slots"
        mode = ForwardMode.DENOISE if step else ForwardMode.OPEN
        row, start = np.array(tokens, dtype=np.int64), len(self._stored)
        left = np.flatnonzero(row == self.mask)
        items = [
            WorkItem(mode, row, start, self._pages, s, step, left, sparse=sparse, unmasked=unmasked)
            for s, sparse in enumerate(settings)
        ]
        hidden_RC, reports = self._forward(items, glass)
        logits_RV = self._runner.model.logits(hidden_RC)
        logits_RV[:, self._parts.tokenizer.vocab_size :] = -torch.inf
        logits_RV[:, self.mask] = -torch.inf
        return Shown(logits_RV.log_softmax(-1).view(len(settings), self.block, -1), reports)

    def end(self) -> None:
        """The block has ended: all slots are released."""
        for method in self._runner.methods.values():
            for slot in range(self.slots):
                method.release(slot)

    def _forward(self, items: list[WorkItem], glass: Glass | None) -> tuple[Tensor, tuple[SegmentReport, ...]]:
        batch = self._runner.tensors(items)
        backend = self._runner.backend if glass is None else glass(self._runner.backend)
        attend = SparseAttend(backend, self._runner.methods, batch)
        hidden_TC = self._runner.model(batch.tokens_T, batch.positions_T, attend)
        return hidden_TC[batch.stored :], attend.report()


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
