"""Counting what a forward read of its prefixes, per segment. Counts stay on the device until they are asked for.

S segments, B block length, G KV heads, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_runtime.attention.backend import KVIndices, PrefixPlan, RowGroup
from losa_runtime.cache.kv_pool import SUMMARY_VECTORS, KVPool
from losa_runtime.core.batch import Segment


class SegmentReport(NamedTuple):
    """What one block segment read in one forward; means are over layers and heads.

    kv_density: share of prefix positions loaded per KV head (the union over rows and over the heads of the group).
    kv_density_q: the same per query head, before the union over the group. An empty prefix that was to be read whole
    counts as 1. row_shares: per row of the block, the share of layers in which its prefix attention was computed.
    dense: every row read the whole prefix in every layer. bypassed: no selection took place because the budget covers
    the prefix. kv_bytes: prefix K/V loaded; metadata_bytes: page summaries and keys loaded to choose them; dense_bytes:
    K/V of the whole prefix; all three over all layers.
    """

    segment: Segment
    kv_density: float
    kv_density_q: float
    row_shares: tuple[float, ...]
    dense: bool
    bypassed: bool
    kv_bytes: int
    metadata_bytes: int
    dense_bytes: int

    @property
    def active_rows(self) -> float:
        """Rows whose prefix attention was computed, mean over layers."""
        return sum(self.row_shares)


class _Lists(NamedTuple):
    """What is kept of a layer's plan of one list per segment and KV head, until the layers are counted together.

    last: last granule of each list (of an empty one, any); None where granules end with the prefix. The rest: as in
    PrefixPlan and KVIndices.
    """

    rows: Tensor | None
    indptr: Tensor
    last: Tensor | None
    granule: int
    whole: tuple[bool, ...]


class PrefixMeter:
    """Adds up what one group reads over the layers of one forward. whole: segments whose budget covers the prefix.

    The common kind of plan is noted and counted for all layers at once: a dozen small operations per layer would take
    as long as a good part of the attention itself.
    """

    def __init__(self, group: RowGroup, whole: tuple[bool, ...] | None = None) -> None:
        self._group = group
        segments = len(group.segments)
        self._bypassed = (False,) * segments if whole is None else whole
        self._layers = 0
        self._scored = [0] * segments  # layers in which the page bounds were read
        self._vectors = [0] * segments  # D-vectors per KV head that were read to choose, beside the bounds
        self._host_rows = 0  # layers in which all rows were computed
        self._counts_3S: Tensor | None = None
        self._rows_SB: Tensor | None = None
        self._extra_S: Tensor | None = None  # positions read per KV head beside the plans
        self._noted: list[_Lists] = []
        self._prefix_S = torch.tensor(group.prefix_lens)

    def add(self, plan: PrefixPlan, pool: KVPool) -> None:
        """Count the plan of one layer."""
        self._layers += 1
        group, segments = self._group, len(self._group.segments)
        if plan.scored is not None:
            self._scored = [n + mine for n, mine in zip(self._scored, plan.scored, strict=True)]
        if self._counts_3S is None or self._rows_SB is None:
            self._prefix_S = self._prefix_S.to(pool.device)
            self._counts_3S = torch.zeros(3, segments, dtype=torch.float64, device=pool.device)
            self._rows_SB = torch.zeros(segments, group.block_length, dtype=torch.float64, device=pool.device)
        if plan.rows is None and (plan.kv is None or all(plan.kv.whole)):
            self._counts_3S += 1.0
            self._host_rows += 1
            return
        if plan.kv is not None and not plan.kv.per_row and plan.kv.heads == pool.num_kv_heads:
            self._noted.append(_note(plan.rows, plan.kv, plan.granule, group.prefix_lens))
            return
        if plan.rows is None:
            rows_S = torch.full_like(self._prefix_S, group.block_length)
            self._host_rows += 1
        else:
            rows_SB = torch.bincount(plan.rows, minlength=segments * group.block_length).view(segments, -1)
            self._rows_SB += rows_SB
            rows_S = rows_SB.sum(1)
        share_kv, share_q = self._shares(plan, rows_S, pool.num_kv_heads)
        whole_S = torch.tensor((True,) * segments if plan.kv is None else plan.kv.whole, device=rows_S.device)
        dense_S = whole_S & (rows_S == group.block_length)
        self._counts_3S += torch.stack((share_kv, share_q, dense_S.double()))

    def also(self, plan: PrefixPlan, pool: KVPool) -> None:
        """Count K/V that a method read beside its plan of this layer: bytes, but neither rows nor density."""
        segments = len(self._group.segments)
        rows_S = torch.full((segments,), self._group.block_length, device=pool.device)
        self._prefix_S = self._prefix_S.to(pool.device)
        if plan.rows is not None:
            rows_S = torch.bincount(plan.rows // self._group.block_length, minlength=segments)
        read_S = self._shares(plan, rows_S, pool.num_kv_heads)[0] * self._prefix_S
        self._extra_S = read_S if self._extra_S is None else self._extra_S + read_S

    def keys(self, index: Sequence[int]) -> None:
        """Count that choosing read every key of these segments in this layer."""
        for segment in index:
            self.vectors(segment, self._group.prefix_lens[segment])

    def vectors(self, segment: int, count: int) -> None:
        """Count that choosing read `count` vectors of size D per KV head for this segment in this layer."""
        self._vectors[segment] += count

    def report(self, pool: KVPool) -> list[SegmentReport]:
        """One entry per segment of the group, in its order."""
        assert self._counts_3S is not None and self._rows_SB is not None, "no layer was counted"
        self._count_noted(pool.num_kv_heads)
        shares = (self._counts_3S / self._layers).T.tolist()
        rows = ((self._rows_SB + self._host_rows) / self._layers).tolist()
        extra = [0.0] * len(shares) if self._extra_S is None else self._extra_S.tolist()
        return [self._one(i, tuple(shares[i]), tuple(rows[i]), extra[i], pool) for i in range(len(shares))]

    def _count_noted(self, kv_heads: int) -> None:
        """Count all noted layers: whole numbers of positions, so that no order of adding matters. L noted layers."""
        if not self._noted:
            return
        assert self._counts_3S is not None and self._rows_SB is not None
        noted, self._noted = self._noted, []
        device, length_S = self._counts_3S.device, self._prefix_S.clamp(min=1)
        rows_LSB = self._noted_rows(noted)
        rows_LS = rows_LSB.sum(2)
        sizes_LSH = torch.stack([layer.indptr for layer in noted]).diff().view(len(noted), -1, kv_heads)
        granule_L11 = torch.tensor([layer.granule for layer in noted], device=device)[:, None, None]
        read_LSH = sizes_LSH * granule_L11
        if any(layer.last is not None for layer in noted):
            none = torch.full((sizes_LSH[0].numel(),), -1, device=device)
            last = torch.stack([none if layer.last is None else layer.last for layer in noted]).view(sizes_LSH.shape)
            beyond_LSH = ((last + 1) * granule_L11 - self._prefix_S[:, None]).clamp(min=0)
            read_LSH = read_LSH - beyond_LSH * (sizes_LSH > 0)
        whole_LS = torch.tensor([layer.whole for layer in noted], device=device)
        read_LS = torch.where(whole_LS, kv_heads * length_S, read_LSH.sum(2)) * (rows_LS > 0)
        share_S = read_LS.sum(0).double() / (kv_heads * length_S)
        dense_S = (whole_LS & (rows_LS == self._group.block_length)).sum(0).double()
        self._counts_3S += torch.stack((share_S, share_S, dense_S))
        self._rows_SB += rows_LSB.sum(0)

    def _noted_rows(self, noted: list[_Lists]) -> Tensor:
        """1 for each row whose prefix attention was computed in a noted layer: int64 [L, S, B]."""
        segments, length = len(self._group.segments), self._group.block_length
        device = self._prefix_S.device
        computed = torch.zeros(len(noted), segments * length, dtype=torch.int64, device=device)
        every = [number for number, layer in enumerate(noted) if layer.rows is None]
        some = [(number, layer.rows) for number, layer in enumerate(noted) if layer.rows is not None]
        computed[torch.tensor(every, dtype=torch.int64, device=device)] = 1
        if some:
            counts = torch.tensor([rows.shape[0] for _, rows in some], device=device)
            number = torch.tensor([number for number, _ in some], device=device).repeat_interleave(counts)
            computed[number, torch.cat([rows for _, rows in some])] = 1
        return computed.view(len(noted), segments, length)

    def _one(
        self,
        index: int,
        shares: tuple[float, ...],
        rows: tuple[float, ...],
        extra: float,
        pool: KVPool,
    ) -> SegmentReport:
        segment, (kv_density, kv_density_q, dense) = self._group.segments[index], shares
        vectors = pool.num_kv_heads * pool.head_dim * pool.dtype.itemsize  # bytes of one vector per KV head
        everything = segment.prefix_len * self._layers
        pages = -(-segment.prefix_len // pool.page_size)
        summaries = self._scored[index] * pages * SUMMARY_VECTORS
        return SegmentReport(
            segment,
            kv_density,
            kv_density_q,
            rows,
            dense=dense == 1.0,
            bypassed=self._bypassed[index],
            kv_bytes=round((kv_density * everything + extra) * 2 * vectors),
            metadata_bytes=(summaries + self._vectors[index]) * vectors,
            dense_bytes=everything * 2 * vectors,
        )

    def _shares(self, plan: PrefixPlan, rows_S: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Share of the prefix that a plan reads, per KV head and per query head: float64 [S] each."""
        if plan.kv is None or all(plan.kv.whole):
            share_S = (rows_S > 0).double()
            return share_S, share_S
        whole_S = torch.tensor(plan.kv.whole, device=rows_S.device)
        share_S = (whole_S & (rows_S > 0)).double()
        if not plan.kv.indices.shape[0]:
            return share_S, share_S
        asked_S = rows_S > 0  # a list without a row to read it is not read
        share_kv = share_S + self._listed(plan.kv, plan, kv_heads) * asked_S
        if plan.kv.heads == kv_heads:
            return share_kv, share_kv
        return share_kv, share_S + self._listed(plan.kv, plan, plan.kv.heads) * asked_S

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
        # Marking takes memory, but a fraction of the time of sorting the entries to find each only once.
        width = -(-max(self._group.prefix_lens) // plan.granule)
        marked_SHn = torch.zeros(self._prefix_S.shape[0], heads, width, dtype=torch.bool, device=owner.device)
        marked_SHn[owner, head * heads // kv.heads, kv.indices] = True
        first_n = torch.arange(width, device=owner.device) * plan.granule
        size_Sn = (self._prefix_S[:, None] - first_n).clamp(min=0, max=plan.granule)
        read_S = (marked_SHn.sum(1) * size_Sn).sum(1)
        return read_S.double() / (heads * self._prefix_S.clamp(min=1))

    def _listed_once(self, kv: KVIndices, granule: int) -> Tensor:
        """`_listed` where nothing is listed twice: granules times their size, less what the last one lacks."""
        sizes_SH = kv.indptr.diff().view(-1, kv.heads)
        last_SH = kv.indices[(kv.indptr[1:] - 1).clamp(min=0)].view(-1, kv.heads)
        beyond_SH = ((last_SH + 1) * granule - self._prefix_S[:, None]).clamp(min=0) * (sizes_SH > 0)
        read_S = (sizes_SH * granule - beyond_SH).sum(1)
        return read_S.double() / (kv.heads * self._prefix_S.clamp(min=1))


def _note(rows: Tensor | None, kv: KVIndices, granule: int, prefix_lens: Sequence[int]) -> _Lists:
    if not kv.indices.shape[0] or all(n % granule == 0 for n in prefix_lens):
        return _Lists(rows, kv.indptr, None, granule, kv.whole)
    return _Lists(rows, kv.indptr, kv.indices[(kv.indptr[1:] - 1).clamp(min=0)], granule, kv.whole)
