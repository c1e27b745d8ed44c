"""FlashBlock (arXiv 2602.05305): a whole block reuses its prefix attention until enough of its tokens are unmasked.

First step of a block: dense prefix attention for all rows; output and log-sum-exp are kept. Later steps:
  1. fewer than `refresh_tokens` tokens unmasked since the last refresh: no row reads the prefix, what is kept serves,
  2. otherwise all rows read the whole prefix again, and that is kept.
Either way the result is merged with dense attention inside the block (done by the caller).

Decided here. A step sees the tokens unmasked before it, so a refresh happens in the step after their acceptance, with
queries that know of them. The published kernel gives a row that was unmasked since the refresh a prefix output of zero
while its old log-sum-exp stays in the merge: the row loses its prefix, and what remains is scaled down by the weight of
what is missing. Here such a row keeps the output that belongs to its log-sum-exp, and there is no option for the other:
a method is not told which rows changed. Storing a finished block is always dense in this runtime.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState, RenewedStates
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.memory import BlockMemory, Geometry
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.step import DenoiseStep


class FlashBlockOptions(MethodOptions):
    """refresh_tokens: newly unmasked tokens that make a refresh due; 2 in the paper's code. 0: a refresh in every step,
    which is exact; at least the block length: never one after the first step.
    """

    refresh_tokens: int = Field(default=2, ge=0, le=MAX_COUNT)


class FlashBlock(SparseMethod):
    """Remembers, per slot and layer, the prefix attention of each row of the current block, and how old it is."""

    Options: ClassVar[type[MethodOptions]] = FlashBlockOptions
    has_budget: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._refreshed: dict[tuple[int, int], int] = {}  # by layer and slot: tokens unmasked at the last refresh

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        due = [self._due(layer, index, step) for index in range(len(step.slots))]
        for slot, unmasked, now in zip(step.slots, step.unmasked, due, strict=True):
            if now:
                self._refreshed[layer, slot] = unmasked
        if all(due):
            return PrefixPlan()
        refreshing = step.part(due)
        return PrefixPlan(step.place_R[:0] if refreshing is None else refreshing.rows)

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> RenewedStates:
        return self.memory.renew(layer, plan.rows, got, step)

    def release(self, slot: int) -> None:
        super().release(slot)
        for key in [key for key in self._refreshed if key[1] == slot]:
            del self._refreshed[key]

    def _due(self, layer: int, index: int, step: DenoiseStep) -> bool:
        """Whether a segment reads its prefix in this step."""
        assert isinstance(step.options, FlashBlockOptions)
        if step.opens[index]:
            return True
        fresh = step.unmasked[index] - self._refreshed[layer, step.slots[index]]
        return fresh >= step.options.refresh_tokens
