"""Counting what a forward read of its prefixes, per segment. Counts stay on the device until the forward is done: then
they are fetched in one piece.

S segments, B block length, G KV heads, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.triton.layout import Planned
from losa_runtime.attention.questions import KVIndices, PrefixPlan, RowGroup, Rows
from losa_runtime.cache.kv_pool import SUMMARY_VECTORS, KVPool
from losa_runtime.cache.transfer import to_device
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

    last: last granule of each list (of an empty one, any); None where granules end with the prefix. scored: False
    where None. The rest: as in PrefixPlan and KVIndices.
    """

    rows: Rows | None
    indptr: Tensor
    last: Tensor | None
    granule: int
    whole: tuple[bool, ...]
    scored: tuple[bool, ...]


class PrefixMeter:
    """Adds up what one group reads over the layers of one forward. whole: segments whose budget covers the prefix.

    The common kind of plan is noted and counted for all layers at once: a dozen small operations per layer would take
    as long as a good part of the attention itself.
    """

    def __init__(self, group: RowGroup, device: torch.device, whole: tuple[bool, ...] | None = None) -> None:
        self._group, self._device = group, device
        segments = len(group.segments)
        self._bypassed = (False,) * segments if whole is None else whole
        self._layers = 0
        self._vectors = [0] * segments  # D-vectors per KV head that were read to choose, beside the bounds
        self._host_dense = 0  # layers in which all rows were computed over the whole prefix
        # Per segment: share read per KV head, per query head, layers that were dense, and in which bounds were read.
        self._counts_4S = torch.zeros(4, segments, dtype=torch.float64, device=device)
        self._rows_SB = torch.zeros(segments, group.block_length, dtype=torch.float64, device=device)
        self._extra_S: Tensor | None = None  # positions read per KV head beside the plans
        self._noted: list[_Lists] = []
        self._counted = False  # whether anything was counted at once instead of being noted
        self._prefix_S = to_device(group.prefix_lens, torch.int64, device)
        self._flags: dict[tuple[bool, ...], Tensor] = {}

    def restart(self) -> None:
        """Forget everything. Only for plans that are noted."""
        assert not self._counted, "what was counted cannot be forgotten"
        self._layers, self._host_dense, self._noted = 0, 0, []

    def adopt(self, recorded: PrefixMeter) -> None:
        """Count the layers that another meter has noted as those of this group, which has the same shape.

        The tensors noted there are read when this meter reports.
        """
        assert not recorded._counted and not any(recorded._vectors), "only what was noted can be counted again"
        self._layers, self._host_dense = recorded._layers, recorded._host_dense
        self._noted = list(recorded._noted)

    def add(self, plan: PrefixPlan, pool: KVPool) -> None:
        """Count the plan of one layer."""
        self._layers += 1
        group, segments = self._group, len(self._group.segments)
        if plan.rows is None and (plan.kv is None or all(plan.kv.whole)):
            self._host_dense += 1
            return
        scored = (False,) * segments if plan.scored is None else plan.scored
        if plan.kv is not None and not plan.kv.per_row and plan.kv.heads == pool.num_kv_heads:
            self._noted.append(_note(plan, plan.kv, scored, group))
            return
        self._counted = True
        rows_SB = self._computed(plan.rows)
        self._rows_SB += rows_SB
        rows_S = rows_SB.sum(1)
        share_kv, share_q = self._shares(plan, rows_S, pool.num_kv_heads)
        whole_S = self._on_device((True,) * segments if plan.kv is None else plan.kv.whole)
        dense_S = whole_S & (rows_S == group.block_length)
        scored_S = self._on_device(scored) & (rows_S > 0)
        self._counts_4S += torch.stack((share_kv, share_q, dense_S.double(), scored_S.double()))

    def also(self, plan: PrefixPlan, pool: KVPool) -> None:
        """Count K/V that a method read beside its plan of this layer: bytes, but neither rows nor density."""
        self._counted = True
        read_S = self._shares(plan, self._computed(plan.rows).sum(1), pool.num_kv_heads)[0] * self._prefix_S
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
        assert self._layers, "no layer was counted"
        self._count_noted(pool.num_kv_heads)
        extra_S = torch.zeros_like(self._counts_4S[0]) if self._extra_S is None else self._extra_S
        found = torch.cat((self._counts_4S.T, extra_S[:, None], self._rows_SB), dim=1).tolist()
        return [self._one(index, row[:4], row[4], row[5:], pool) for index, row in enumerate(found)]

    def _computed(self, rows: Rows | None) -> Tensor:
        """1 for each row whose prefix attention was computed: int64 [S, B]."""
        segments, length = len(self._group.segments), self._group.block_length
        if rows is None:
            return torch.ones(segments, length, dtype=torch.int64, device=self._device)
        if isinstance(rows, Planned):
            return (rows.order >= 0).long().view(segments, length)
        computed = torch.zeros(segments * length, dtype=torch.int64, device=self._device)
        return computed.index_fill_(0, rows, 1).view(segments, length)

    def _on_device(self, flags: tuple[bool, ...]) -> Tensor:
        """A flag per segment, brought there once."""
        found = self._flags.get(flags)
        if found is None:
            found = self._flags[flags] = to_device(flags, torch.bool, self._device)
        return found

    def _count_noted(self, kv_heads: int) -> None:
        """Count all noted layers: whole numbers of positions, so that no order of adding matters. L noted layers."""
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        device, length_S = self._device, self._prefix_S.clamp(min=1)
        rows_LSB = self._noted_rows(noted)
        rows_LS = rows_LSB.sum(2)
        sizes_LSH = torch.stack([layer.indptr for layer in noted]).diff().view(len(noted), -1, kv_heads)
        granule_L11 = self._numbers([layer.granule for layer in noted])[:, None, None]
        read_LSH = sizes_LSH * granule_L11
        if any(layer.last is not None for layer in noted):
            none = torch.full((sizes_LSH[0].numel(),), -1, device=device)
            last = torch.stack([none if layer.last is None else layer.last for layer in noted]).view(sizes_LSH.shape)
            beyond_LSH = ((last + 1) * granule_L11 - self._prefix_S[:, None]).clamp(min=0)
            read_LSH = read_LSH - beyond_LSH * (sizes_LSH > 0)
        flags_L2S = to_device([(layer.whole, layer.scored) for layer in noted], torch.bool, device)
        whole_LS, scored_LS = flags_L2S.unbind(1)
        read_LS = torch.where(whole_LS, kv_heads * length_S, read_LSH.sum(2)) * (rows_LS > 0)
        share_S = read_LS.sum(0).double() / (kv_heads * length_S)
        dense_S = (whole_LS & (rows_LS == self._group.block_length)).sum(0).double()
        scored_S = (scored_LS & (rows_LS > 0)).sum(0).double()
        self._counts_4S += torch.stack((share_S, share_S, dense_S, scored_S))
        self._rows_SB += rows_LSB.sum(0)

    def _noted_rows(self, noted: list[_Lists]) -> Tensor:
        """1 for each row whose prefix attention was computed in a noted layer: int64 [L, S, B]."""
        segments, length = len(self._group.segments), self._group.block_length
        computed = torch.zeros(len(noted), segments * length, dtype=torch.int64, device=self._device)
        rows = [layer.rows for layer in noted]
        every = [number for number, mine in enumerate(rows) if mine is None]
        listed = [(number, mine) for number, mine in enumerate(rows) if isinstance(mine, Tensor)]
        chosen = [(number, mine) for number, mine in enumerate(rows) if isinstance(mine, Planned)]
        if every:
            computed[self._numbers(every)] = 1
        if listed:
            total, counts = sum(len(mine) for _, mine in listed), self._numbers([len(mine) for _, mine in listed])
            number = self._numbers([number for number, _ in listed]).repeat_interleave(counts, output_size=total)
            computed[number, torch.cat([mine for _, mine in listed])] = 1
        if chosen:
            places = torch.stack([mine.order for _, mine in chosen])
            computed[self._numbers([number for number, _ in chosen])] = (places >= 0).long()
        return computed.view(len(noted), segments, length)

    def _numbers(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self._device)

    def _one(
        self,
        index: int,
        counts: Sequence[float],
        extra: float,
        rows: Sequence[float],
        pool: KVPool,
    ) -> SegmentReport:
        """counts: a column of `_counts_4S`; extra: of `_extra_S`; rows: a line of `_rows_SB`."""
        segment, layers = self._group.segments[index], self._layers
        kv_density, kv_density_q = ((shared + self._host_dense) / layers for shared in counts[:2])
        dense, scored = counts[2] + self._host_dense, counts[3]
        vectors = pool.num_kv_heads * pool.head_dim * pool.dtype.itemsize  # bytes of one vector per KV head
        everything = segment.prefix_len * layers
        pages = -(-segment.prefix_len // pool.page_size)
        summaries = round(scored) * pages * SUMMARY_VECTORS
        return SegmentReport(
            segment,
            kv_density,
            kv_density_q,
            tuple((count + self._host_dense) / layers for count in rows),
            dense=dense == layers,
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
        whole_S = self._on_device(plan.kv.whole)
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
        segments, lists = len(self._group.segments), kv.indptr.shape[0] - 1
        # Entries in the room behind the last list belong to a list of their own, and it to a segment that is dropped.
        ends = torch.cat((kv.indptr[1:], kv.indptr.new_full((1,), kv.indices.shape[0])))
        sizes = ends - kv.indptr
        entry = torch.arange(lists + 1, device=ends.device).repeat_interleave(sizes, output_size=kv.indices.shape[0])
        real, owner, head = entry < lists, entry // kv.heads, entry % kv.heads
        if kv.per_row:
            rows = plan.rows.rows if isinstance(plan.rows, Planned) else plan.rows
            owner = (owner if rows is None else rows[owner.clamp(max=len(rows) - 1)]) // self._group.block_length
        # Marking takes memory, but a fraction of the time of sorting the entries to find each only once.
        width = -(-max(self._group.prefix_lens) // plan.granule)
        marked_SHn = torch.zeros(segments + 1, heads, width, dtype=torch.bool, device=self._device)
        owner, granule = torch.where(real, owner, segments), torch.where(real, kv.indices, 0)
        marked_SHn[owner, head * heads // kv.heads, granule] = True
        first_n = torch.arange(width, device=owner.device) * plan.granule
        size_Sn = (self._prefix_S[:, None] - first_n).clamp(min=0, max=plan.granule)
        read_S = (marked_SHn[:-1].sum(1) * size_Sn).sum(1)
        return read_S.double() / (heads * self._prefix_S.clamp(min=1))

    def _listed_once(self, kv: KVIndices, granule: int) -> Tensor:
        """`_listed` where nothing is listed twice: granules times their size, less what the last one lacks."""
        sizes_SH = kv.indptr.diff().view(-1, kv.heads)
        last_SH = kv.indices[(kv.indptr[1:] - 1).clamp(min=0)].view(-1, kv.heads)
        beyond_SH = ((last_SH + 1) * granule - self._prefix_S[:, None]).clamp(min=0) * (sizes_SH > 0)
        read_S = (sizes_SH * granule - beyond_SH).sum(1)
        return read_S.double() / (kv.heads * self._prefix_S.clamp(min=1))


def _note(plan: PrefixPlan, kv: KVIndices, scored: tuple[bool, ...], group: RowGroup) -> _Lists:
    last = None
    # What is recorded on padding may be run with prefixes of any length.
    if kv.indices.shape[0] and (group.padding or any(n % plan.granule for n in group.prefix_lens)):
        last = kv.indices[(kv.indptr[1:] - 1).clamp(min=0)]
    return _Lists(plan.rows, kv.indptr, last, plan.granule, kv.whole, scored)
