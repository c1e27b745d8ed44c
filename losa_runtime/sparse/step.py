"""What a method is told of one forward: its segments, their parameters and slots, and where to report extra reading.

S segments, B block length, R = S * B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from losa_runtime.attention.backend import RowGroup
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.sparse.density import PrefixMeter


class Part(NamedTuple):
    """Some segments of a group as a group of their own.

    segments: their numbers in the whole group; rows: their rows in it, int64.
    """

    group: RowGroup
    segments: tuple[int, ...]
    rows: Tensor


class DenoiseStep:
    """What a method sees of its block segments in one forward: made once, used by every layer.

    group: the segments and their rows. slots: state index per segment. opens: per segment, True in the first step of
    its block; numbers: its denoising step; unmasked: tokens accepted in it before this step. options: the method's, the
    same for all segments. budgets: tokens each query may read, per segment; whole: True where that covers the prefix
    (never without a `budget` rule). meter: where the method reports what it reads beside its plan.
    """

    def __init__(
        self, group: RowGroup, device: torch.device, budget: Callable[[SparseParams, int], int] | None = None
    ) -> None:
        params = [segment.sparse for segment in group.segments]
        assert None not in params, "a block segment without sparse parameters"
        self.group, self._device = group, device
        self.params: tuple[SparseParams, ...] = tuple(p for p in params if p is not None)
        self.options: BaseModel = self.params[0].options
        assert all(p.options == self.options for p in self.params), "different options in one group"
        self.slots = tuple(segment.slot for segment in group.segments)
        assert len(set(self.slots)) == len(self.slots), f"two segments share a slot: {self.slots}"
        self.opens = tuple(segment.mode is ForwardMode.OPEN for segment in group.segments)
        self.numbers = tuple(segment.step for segment in group.segments)
        self.unmasked = tuple(segment.unmasked for segment in group.segments)
        pairs = list(zip(self.params, group.prefix_lens, strict=True))
        self.budgets = tuple(0 if budget is None else budget(p, n) for p, n in pairs)
        covered = zip(group.prefix_lens, self.budgets, strict=True)
        self.whole = tuple(budget is not None and n <= b for n, b in covered)
        self.meter = PrefixMeter(group, self.whole)

    @cached_property
    def slots_S(self) -> Tensor:
        """`slots` on the device, int64."""
        return self.tensor(self.slots, torch.int64)

    @cached_property
    def place_R(self) -> Tensor:
        """slot * B + offset of each row, int64: where per-row state lies."""
        block = self.group.block_length
        return (self.slots_S[:, None] * block + torch.arange(block, device=self._device)).flatten()

    @cached_property
    def budget_S(self) -> Tensor:
        """`budgets` on the device, int64."""
        return self.tensor(self.budgets, torch.int64)

    @cached_property
    def masked_SB(self) -> Tensor:
        """Rows that may still be unmasked, bool."""
        block = self.group.block_length
        every = tuple(range(block))
        some = [every if segment.masked is None else segment.masked for segment in self.group.segments]
        flags = [[offset in mine for offset in every] for mine in map(frozenset, some)]
        return self.tensor(flags, torch.bool)

    @cached_property
    def active_count_S(self) -> Tensor:
        """Rows to recompute by the count and ratio rules, int64; 0 under the tau rule."""
        return self.tensor([_active_count(p.active, self.group.block_length) for p in self.params], torch.int64)

    @cached_property
    def active_tau_S(self) -> Tensor:
        """Share of the change to be covered under the tau rule, float32; 0 under the others."""
        shares = [p.active.value if p.active.kind == "tau" else 0.0 for p in self.params]
        return self.tensor(shares, torch.float32)

    @cached_property
    def opening(self) -> Part | None:
        """The segments in the first step of their block."""
        return self.part(self.opens)

    def part(self, wanted: Sequence[bool]) -> Part | None:
        """The segments where `wanted`, as a group of their own; None if there are none."""
        index = tuple(i for i, mine in enumerate(wanted) if mine)
        if not index:
            return None
        block = self.group.block_length
        group = RowGroup.of([self.group.segments[i] for i in index], block, self._device)
        first = self.tensor([i * block for i in index], torch.int64)
        return Part(group, index, (first[:, None] + torch.arange(block, device=self._device)).flatten())

    def tensor(self, values: Collection[Any], dtype: torch.dtype) -> Tensor:
        """Host values on the group's device."""
        return torch.tensor(values, dtype=dtype, device=self._device)


def _active_count(rule: ActiveRule, block_length: int) -> int:
    """Rows by count, or by ratio rounded up so that a positive share is never no row."""
    if rule.kind == "tau":
        return 0
    return int(rule.value) if rule.kind == "count" else math.ceil(rule.value * block_length)
