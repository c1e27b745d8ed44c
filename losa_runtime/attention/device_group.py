"""A group of segments as Triton's kernels are told of it: brought to the device once, before the group's first layer.

Knows no kernel but their nouns, and no pages but where their numbers lie.
R rows, S segments, B block length, T tiles.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from losa_kernels.triton.layout import Planned, Segments
from losa_kernels.triton.prefill import StoredRows, Tiles, tile_numbers
from losa_runtime.attention.questions import RowGroup, Rows
from losa_runtime.cache.transfer import to_device, vectors_to_device


class DeviceGroup:
    """Block segments. segments: their page tables and prefixes; every: all of their rows, as planned ones."""

    def __init__(self, group: RowGroup, device: torch.device) -> None:
        starts, table = _tables(group)
        ends, prefix_lens = vectors_to_device([starts, group.prefix_lens], device)
        self.segments = Segments(ends, table, prefix_lens, group.block_length, max(group.prefix_lens))
        self.every = Planned.every(self.segments)
        self._device = device
        self._flags: dict[tuple[bool, ...], Tensor] = {}
        self._last: tuple[Tensor, Planned] | None = None

    def flags(self, values: tuple[bool, ...]) -> Tensor:
        """A flag per segment, bool [S]."""
        found = self._flags.get(values)
        if found is None:
            found = self._flags[values] = to_device(values, torch.bool, self._device)
        return found

    def refresh(self, fresh: DeviceGroup) -> None:
        """Become another group of the same shape. Bounds stay, and flags are of this group."""
        for mine, theirs in zip(self._numbers, fresh._numbers, strict=True):
            mine.copy_(theirs)

    @property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        """What is the segments' own."""
        return self.segments.table, self.segments.prefix_lens

    def planned(self, rows: Rows | None) -> Planned:
        """The rows of a plan. Those that a method lists for all layers are looked at once."""
        if rows is None:
            return self.every
        if isinstance(rows, Planned):
            return rows
        if self._last is None or self._last[0] is not rows:
            self._last = (rows, Planned.of(rows.contiguous(), self.segments))
        return self._last[1]


def stored_tiles(group: RowGroup, share: int, size: int, device: torch.device) -> Tiles:
    """The rows of store segments in tiles of that size. share: query heads per KV head."""
    starts, table = _tables(group)
    rows = [StoredRows(*about) for about in zip(group.starts, group.counts, group.prefix_lens, starts, strict=False)]
    longest = max(mine.position + mine.rows for mine in rows)
    return Tiles(to_device(tile_numbers(rows, share, size), torch.int64, device), table, size, longest)


def _tables(group: RowGroup) -> tuple[list[int], Tensor]:
    """Where each segment's page table begins, and the end of the last one; the tables one after another."""
    tables = [segment.pages for segment in group.segments]
    return [0, *accumulate(table.shape[0] for table in tables)], torch.cat(tables)
