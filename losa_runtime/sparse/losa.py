"""LoSA (arXiv 2604.12056): only the rows whose query changed are recomputed, over few pages; the rest is remembered.

First step of a block: dense prefix attention for all rows; output and log-sum-exp are kept. Later steps, per layer:
  1. change of row i = mean squared difference of its query to that of the previous step (section on locality),
  2. the most changed rows are active: one set per layer, shared by all heads,
  3. active rows select pages by QUEST's bounds; all of them read the union of their choices,
  4. their fresh output and log-sum-exp replace the remembered ones; stable rows keep theirs,
  5. the result is merged with dense attention inside the block (done by the caller).

Decided here, because the paper leaves it open: 5 of 16 rows are active by default; a KV group shares one list (largest
score among its query heads); active rows read the whole union and not their own part of it; no layer is kept dense and
nothing is refreshed densely inside a block; the reference of the change is the previous step and not the last refresh;
a prefix within the budget is read whole, by active rows only, so that just staleness remains.
S segments, B block length, R = S * B rows, H query heads, D head dim.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend, AttnState, PrefixPlan
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.sparse.method import DenoiseStep, Geometry, SparseMethod
from losa_runtime.sparse.pages import plan_pages


class _Memory(NamedTuple):
    """State of all slots, allocated once: [layers, slots, B, H, D], lse without D. out and lse are float32."""

    out: Tensor
    lse: Tensor
    query: Tensor


class Losa(SparseMethod):
    """Holds, per slot and layer, the previous query and the prefix attention of each row of the current block."""

    summaries: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_BOUNDS})
    has_active_rows: ClassVar[bool] = True

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._memory: _Memory | None = None
        self._open = np.zeros((geometry.num_layers, geometry.max_slots), dtype=bool)

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        memory = self._allocate(q_RHD)
        q_SBHD = q_RHD.view(len(step.slots), self.geometry.block_length, *q_RHD.shape[1:])
        if all(step.opens):
            rows = None
            memory.query[layer, step.slots_S] = q_SBHD
        else:
            rows = self._active(layer, q_SBHD, step, memory, backend)
        whole = tuple(first or covered for first, covered in zip(step.opens, step.whole, strict=True))
        return plan_pages(layer, q_RHD, rows, whole, step, backend, self.geometry)

    def complete(self, layer: int, plan: PrefixPlan, got: AttnState, step: DenoiseStep) -> AttnState:
        memory = self._allocate(got.out_RHD)
        block = self.geometry.block_length
        out_XHD, lse_XH = memory.out[layer].flatten(0, 1), memory.lse[layer].flatten(0, 1)  # views: slot * B + row
        place_R = (step.slots_S[:, None] * block + torch.arange(block, device=out_XHD.device)).flatten()
        written = place_R if plan.rows is None else place_R[plan.rows]
        out_XHD.index_copy_(0, written, got.out_RHD)
        lse_XH.index_copy_(0, written, got.lse_RH)
        self._open[layer, [slot for slot, first in zip(step.slots, step.opens, strict=True) if first]] = True
        return got if plan.rows is None else AttnState(*(x.index_select(0, place_R) for x in (out_XHD, lse_XH)))

    @classmethod
    def state_bytes(cls, geometry: Geometry, itemsize: int) -> int:
        rows = math.prod(state_shape(geometry)[:-1])
        return rows * ((geometry.head_dim + 1) * 4 + geometry.head_dim * itemsize)

    def release(self, slot: int) -> None:
        self._open[:, slot] = False

    def _active(
        self, layer: int, q_SBHD: Tensor, step: DenoiseStep, memory: _Memory, backend: AttentionBackend
    ) -> Tensor:
        """Rows to recompute, int64 sorted: all of an opening block, the most changed ones of the others."""
        open_slots = self._open[layer]
        pairs = zip(step.slots, step.opens, strict=True)
        unknown = [slot for slot, first in pairs if not first and not open_slots[slot]]
        assert not unknown, f"slots {unknown} are read in layer {layer} without an opening step"
        rules = (step.active_count_S, step.active_tau_S)
        return backend.changed_rows(q_SBHD, memory.query[layer], step.slots_S, step.opens, *rules)

    def _allocate(self, like: Tensor) -> _Memory:
        """The memory, made when the first query tells its dtype."""
        if self._memory is None:
            shape = state_shape(self.geometry)
            out, lse = (torch.zeros(s, dtype=torch.float32, device=like.device) for s in (shape, shape[:-1]))
            self._memory = _Memory(out, lse, torch.zeros(shape, dtype=like.dtype, device=like.device))
        return self._memory


def state_shape(geometry: Geometry) -> tuple[int, int, int, int, int]:
    """[layers, slots, B, H, D] of the remembered outputs: B (D + 1) numbers per head with the log-sum-exp."""
    g = geometry
    return g.num_layers, g.max_slots, g.block_length, g.num_heads, g.head_dim
