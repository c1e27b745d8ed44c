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

from losa_runtime.attention.questions import ActiveRules, PerSegment, RowGroup
from losa_runtime.cache.transfer import to_device, vectors_to_device
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

    group: the segments and their rows. slots: state index per segment, slots_S: int64, on the device; used_slots: those
    of segments that have something to unmask (others are padding, and share a slot that is nobody's). place_R: slot * B
    + offset of each row, int64: where per-row state lies. opens: per segment, True in the first step of its block;
    numbers: its denoising step; unmasked: tokens accepted in it before this step. options: the method's, the same for
    all segments. budgets: tokens each query may read, per segment, budget_S: int64, on the device; whole: True where
    that covers the prefix (never without a `budget` rule). meter: where the method reports what it reads beside its
    plan.

    What is on the device is brought there when the step is made, before the first layer.
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
        self.used_slots = tuple(segment.slot for segment in group.segments if segment.masked != ())
        assert len(set(self.used_slots)) == len(self.used_slots), f"two segments share a slot: {self.slots}"
        self.opens = tuple(segment.mode is ForwardMode.OPEN for segment in group.segments)
        self.numbers = tuple(segment.step for segment in group.segments)
        self.unmasked = tuple(segment.unmasked for segment in group.segments)
        pairs = list(zip(self.params, group.prefix_lens, strict=True))
        self.budgets = tuple(0 if budget is None else budget(p, n) for p, n in pairs)
        covered = zip(group.prefix_lens, self.budgets, strict=True)
        self.whole = tuple(budget is not None and n <= b for n, b in covered)
        self.meter = PrefixMeter(group, device, self.whole)
        block = group.block_length
        counts = [_active_count(p.active, block) for p in self.params]
        self.slots_S, self.budget_S, self._count_S = vectors_to_device([self.slots, self.budgets, counts], device)
        self._tau_S = self.tensor([_active_share(p.active) for p in self.params], torch.float32)
        self._most = tuple(most_active(p.active, block) for p in self.params)
        self.place_R = (self.slots_S[:, None] * block + torch.arange(block, device=device)).flatten()
        self._parts: dict[tuple[bool, ...], Part | None] = {}
        self._best: dict[int, PerSegment] = {}

    def best(self, granule: int) -> PerSegment:
        """Granules of that many tokens that each query may read."""
        found = self._best.get(granule)
        if found is None:
            most = tuple(budget // granule for budget in self.budgets)
            found = self._best[granule] = PerSegment(self.budget_S // granule, most)
        return found

    def active_rules(self, fresh: tuple[bool, ...], keep_stable: bool) -> ActiveRules:
        """The requests' `active_*`, but all rows of the segments in `fresh`."""
        block = self.group.block_length
        most = tuple(block if every else n for every, n in zip(fresh, self._most, strict=True))
        return ActiveRules(self._count_S, self._tau_S, fresh, most, keep_stable)

    @cached_property
    def masked_SB(self) -> Tensor:
        """Rows that may still be unmasked, bool."""
        block = self.group.block_length
        every = tuple(range(block))
        some = [every if segment.masked is None else segment.masked for segment in self.group.segments]
        flags = [[offset in mine for offset in every] for mine in map(frozenset, some)]
        return self.tensor(flags, torch.bool)

    def refresh(self, fresh: DenoiseStep) -> None:
        """Write to the tensors of this step what they hold for another one of the same shape."""
        mine, theirs = self._inputs, fresh._inputs
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        for granule, best in self._best.items():
            best.device_S.copy_(self.budget_S // granule)

    @property
    def _inputs(self) -> dict[str, Tensor]:
        """What the host says of the segments, on the device."""
        return {
            "slots": self.slots_S,
            "places": self.place_R,
            "budgets": self.budget_S,
            "active counts": self._count_S,
            "active shares": self._tau_S,
        }

    def part(self, wanted: Sequence[bool]) -> Part | None:
        """The segments where `wanted`, as a group of their own, made once; None if there are none."""
        key = tuple(wanted)
        if key not in self._parts:
            self._parts[key] = self._part(tuple(i for i, mine in enumerate(key) if mine))
        return self._parts[key]

    def tensor(self, values: Collection[Any], dtype: torch.dtype) -> Tensor:
        """Host values on the group's device."""
        return to_device(values, dtype, self._device)

    def _part(self, index: tuple[int, ...]) -> Part | None:
        if not index:
            return None
        block = self.group.block_length
        group = RowGroup.of([self.group.segments[i] for i in index], block, self._device)
        first = self.tensor([i * block for i in index], torch.int64)
        return Part(group, index, (first[:, None] + torch.arange(block, device=self._device)).flatten())


def most_active(rule: ActiveRule, block_length: int) -> int:
    """Bound on the rows of a block that a rule lets be recomputed."""
    return block_length if _active_share(rule) else min(_active_count(rule, block_length), block_length)


def _active_count(rule: ActiveRule, block_length: int) -> int:
    """Rows by count, or by ratio rounded up so that a positive share is never no row; 0 under the tau rule."""
    if rule.kind == "tau":
        return 0
    return int(rule.value) if rule.kind == "count" else math.ceil(rule.value * block_length)


def _active_share(rule: ActiveRule) -> float:
    """Share of the change to be covered under the tau rule, 0 under the others."""
    return rule.value if rule.kind == "tau" else 0.0
