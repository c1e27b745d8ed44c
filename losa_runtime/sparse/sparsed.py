"""SparseD (arXiv 2509.24014): dense for the first steps, then a fixed choice of key blocks per query head.

  1. The first `dense_share` of a block's planned steps read the whole prefix.
  2. In the last of them, per layer and query head: softmax mass of each prefix key, mean over the block's rows, pooled
     over key blocks of `block_size` tokens; the best key blocks are held.
  3. All later steps of the block read the held key blocks, for all rows; nothing is chosen again.

Decided here, because the paper decodes a whole sequence in a known number of steps and here blocks end when they may.
  Share of steps: of the request's denoising_steps, rounded up and at least one; a block that is done within its dense
  steps never turns sparse. (The paper's code is dense for int(share * steps) + 2 steps.)
  Isolated selection, the paper's separate choice among the generated tokens, becomes what block diffusion does anyway:
  the block's own tokens are attended densely and never compete with the prefix, whose mass is relative to itself.
  One query block: the rows of the diffusion block share the choice of a query head.
  Budget: token_budget / block_size key blocks, rounded up, so that methods are compared at equal budgets; the paper
  keeps a share of the prefix (`keep_ratio`). A last key block with fewer tokens is pooled as if the missing ones had no
  mass, as it takes the place of a full one. Ties go to the lowest key block. A prefix within the budget is read whole.
R rows, H query heads, D head dim, n key blocks.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from losa_kernels.reference.selection import top_pages
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.memory import BlockMemory, Geometry, HeldLists
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.step import DenoiseStep


class SparseDOptions(MethodOptions):
    """dense_share: share of the planned steps that read everything (the paper's skip; 0.2 there, too).

    block_size: tokens per key block; 32 in the paper for short tasks, 128 for long ones. keep_ratio: the paper's rho,
    the share of key blocks to keep, int(n * keep_ratio) + 1 of n; 0.5 there for short tasks, 0.3 for long ones. It
    takes the place of token_budget, which then means nothing; absent by default.
    """

    dense_share: float = Field(default=0.2, ge=0.0, le=1.0)
    block_size: int = Field(default=32, ge=1, le=MAX_COUNT)
    keep_ratio: float | None = Field(default=None, gt=0.0, le=1.0)


class SparseD(SparseMethod):
    """Holds, per slot and layer, the chosen key blocks of each query head for the current block."""

    Options: ClassVar[type[MethodOptions]] = SparseDOptions

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._lists = HeldLists()

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        dense = (number < count for number, count in zip(step.numbers, _dense_steps(step), strict=True))
        whole = tuple(first or covered for first, covered in zip(dense, step.whole, strict=True))
        if all(whole):
            return PrefixPlan()
        return PrefixPlan(None, self._lists.lists(layer, step.slots, whole), _options(step.options).block_size)

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> PrefixState:
        last = [number + 1 == count for number, count in zip(step.numbers, _dense_steps(step), strict=True)]
        choosing = step.part([now and not covered for now, covered in zip(last, step.whole, strict=True)])
        if choosing is None:
            return got
        step.meter.keys(choosing.segments)
        got = backend.settle(got)
        size = _options(step.options).block_size
        rows = choosing.rows
        mass_SHn = backend.prefix_mass(layer, q_RHD[rows], got.lse_RH[rows], size, choosing.group)
        for mass_Hn, index in zip(mass_SHn, choosing.segments, strict=True):
            real_Hn = mass_Hn[:, : -(-step.group.prefix_lens[index] // size)]
            [chosen_Hn] = top_pages(real_Hn[None], step.budget_S[index : index + 1] // size)
            self._lists.put(layer, step.slots[index], chosen_Hn)
        return got

    def release(self, slot: int) -> None:
        super().release(slot)
        self._lists.close(slot)

    @classmethod
    def instead_of_budget(cls, options: MethodOptions) -> str | None:
        return None if _options(options).keep_ratio is None else "keep_ratio"

    @classmethod
    def budget(cls, params: SparseParams, prefix_len: int) -> int:
        """Tokens of the key blocks that each query head keeps: a multiple of block_size, by keep_ratio if it is set."""
        options = _options(params.options)
        if options.keep_ratio is None:
            return -(-params.token_budget // options.block_size) * options.block_size
        key_blocks = -(-prefix_len // options.block_size)
        return (int(key_blocks * options.keep_ratio) + 1) * options.block_size


def dense_steps(share: float, planned_steps: int) -> int:
    """The share of the steps, rounded up, at least one. 0.7 of 10 is 7, although the product of the floats is more."""
    return max(1, math.ceil(round(share * planned_steps, 9)))


def _dense_steps(step: DenoiseStep) -> list[int]:
    """Dense first steps of each segment's block."""
    share = _options(step.options).dense_share
    return [dense_steps(share, params.planned_steps) for params in step.params]


def _options(options: object) -> SparseDOptions:
    assert isinstance(options, SparseDOptions)
    return options
