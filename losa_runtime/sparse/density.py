"""Counting what a forward read of its prefixes, per segment. Counts stay on the device until they are asked for.

S segments, B block length, G KV heads, H query heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losa_runtime.attention.backend import KVIndices, PrefixPlan, RowGroup
from losa_runtime.cache.kv_pool import KVPool
from losa_runtime.core.batch import Segment


class SegmentReport(NamedTuple):
    """What one block segment read in one forward; means are over layers and heads.

    kv_density: share of prefix positions loaded per KV head (the union over rows and over the heads of the group).
    kv_density_q: the same per query head, before the union over the group. An empty prefix that was to be read whole
    counts as 1. active_rows: rows whose prefix attention was computed. dense: every row read the whole prefix in every
    layer. bypassed: no selection took place because the budget covers the prefix.
    kv_bytes: prefix K/V loaded; metadata_bytes: page summaries loaded; both over all layers.
    """

    segment: Segment
    kv_density: float
    kv_density_q: float
    active_rows: float
    dense: bool
    bypassed: bool
    kv_bytes: int
    metadata_bytes: int


class PrefixMeter:
    """Adds up the plans of one group over the layers of one forward."""

    def __init__(self, group: RowGroup, whole: tuple[bool, ...], pool: KVPool) -> None:
        self._group, self._whole, self._pool = group, whole, pool
        segments, device = len(group.segments), pool.device
        self._layers = 0
        self._scored: list[tuple[bool, ...]] = []  # per layer that scored anything
        self._counts_4S = torch.zeros(4, segments, dtype=torch.float64, device=device)
        self._prefix_S = torch.tensor(group.prefix_lens, device=device)
        # What a layer adds in which all rows read everything.
        everything = (1.0, 1.0, float(group.block_length), 1.0)
        self._everything_4S = torch.tensor(everything, dtype=torch.float64, device=device)[:, None]

    def add(self, plan: PrefixPlan) -> None:
        """Count one layer."""
        self._layers += 1
        group, segments = self._group, len(self._group.segments)
        if plan.scored is not None:
            self._scored.append(plan.scored)
        if plan.rows is None and (plan.kv is None or all(plan.kv.whole)):
            self._counts_4S += self._everything_4S
            return
        if plan.rows is None:
            rows_S = torch.full_like(self._prefix_S, group.block_length)
        else:
            rows_S = torch.bincount(plan.rows // group.block_length, minlength=segments)
        if plan.kv is None or all(plan.kv.whole):
            share_S, dense_S = rows_S > 0, rows_S == group.block_length
        else:
            whole_S = torch.tensor(plan.kv.whole, device=rows_S.device)
            share_S, dense_S = whole_S & (rows_S > 0), whole_S & (rows_S == group.block_length)
        share_q = share_kv = share_S
        if plan.kv is not None and plan.kv.indices.shape[0]:
            share_q = share_kv = share_S + self._listed(plan.kv, plan, self._pool.num_kv_heads)
            if plan.kv.heads != self._pool.num_kv_heads:
                share_q = share_S + self._listed(plan.kv, plan, plan.kv.heads)
        self._counts_4S += torch.stack((share_kv.double(), share_q.double(), rows_S.double(), dense_S.double()))

    def report(self) -> list[SegmentReport]:
        """One entry per segment of the group, in its order."""
        counts = (self._counts_4S / max(self._layers, 1)).tolist()
        return [self._one(index, *(row[index] for row in counts)) for index in range(len(self._group.segments))]

    def _one(self, index: int, kv_density: float, kv_density_q: float, active: float, dense: float) -> SegmentReport:
        segment, pool = self._group.segments[index], self._pool
        vector = pool.head_dim * pool.dtype.itemsize
        positions = round(kv_density * segment.prefix_len * self._layers * pool.num_kv_heads)
        pages = -(-segment.prefix_len // pool.page_size)
        metadata = (
            sum(scored[index] for scored in self._scored) * pages * pool.num_kv_heads * pool.summary_vectors * vector
        )
        return SegmentReport(
            segment,
            kv_density,
            kv_density_q,
            active_rows=active,
            dense=dense == 1.0,
            bypassed=self._whole[index],
            kv_bytes=positions * 2 * vector,
            metadata_bytes=metadata,
        )

    def _listed(self, kv: KVIndices, plan: PrefixPlan, heads: int) -> Tensor:
        """Share of the prefix in the lists, mean over `heads` (at most kv.heads) after a union inside each: [S]."""
        if not kv.per_row and heads == kv.heads:
            return self._listed_once(kv, plan.granule)
        lists = kv.indptr.shape[0] - 1
        entry = torch.repeat_interleave(torch.arange(lists, device=kv.indptr.device), kv.indptr.diff())
        owner, head = entry // kv.heads, entry % kv.heads
        if kv.per_row:
            rows = torch.arange(lists // kv.heads, device=owner.device) if plan.rows is None else plan.rows
            owner = rows[owner] // self._group.block_length
        head = head * heads // kv.heads
        index = kv.indices
        if kv.per_row or heads < kv.heads:
            found = torch.unique(torch.stack((owner, head, index)), dim=1)
            owner, head, index = found[0], found[1], found[2]
        read = (self._prefix_S[owner] - index * plan.granule).clamp(max=plan.granule)
        total = torch.zeros(self._prefix_S.shape[0], dtype=torch.float64, device=read.device)
        total.index_add_(0, owner, read.double())
        return total / (heads * self._prefix_S.clamp(min=1))

    def _listed_once(self, kv: KVIndices, granule: int) -> Tensor:
        """`_listed` where nothing is listed twice: granules times their size, less what the last one lacks."""
        sizes_SH = kv.indptr.diff().view(-1, kv.heads)
        last_SH = kv.indices[(kv.indptr[1:] - 1).clamp(min=0)].view(-1, kv.heads)
        beyond_SH = ((last_SH + 1) * granule - self._prefix_S[:, None]).clamp(min=0) * (sizes_SH > 0)
        read_S = (sizes_SH * granule - beyond_SH).sum(1)
        return read_S.double() / (kv.heads * self._prefix_S.clamp(min=1))
