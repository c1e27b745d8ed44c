"""What the GPU backends share, all of it in Triton: rows and lists are chosen on the device, and no layer of a later
step waits for it.

What changes from step to step lies on the device; the host gives bounds, which size grids and buffers and never a
result. In-block attention, merging and remembering are one kernel, which takes the prefix attention in the parts in
which it was computed. K/V and queries are read in their dtypes, sums are float32.
R rows, n planned rows, S segments, H query heads, G KV heads, D head dim, X slots, C splits.
"""

from __future__ import annotations

from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from losa_kernels.triton import mass
from losa_kernels.triton.active import active_rows, plan_rows
from losa_kernels.triton.block import Fresh, Kept, attend_block, finish_block, fits
from losa_kernels.triton.change import keep_changed, query_change
from losa_kernels.triton.choose import page_bars
from losa_kernels.triton.layout import FLOATS, MAX_HEAD_DIM, Lists, Pages, Parts, Planned
from losa_kernels.triton.merge import merge_parts, merge_states
from losa_kernels.triton.prefill import Tiles, attend_stored
from losa_kernels.triton.prefix import (
    CHUNK,
    MAX_KEYS,
    MAX_TILE_ROWS,
    attend_prefix,
    filling_chunk,
    holds_peaks,
    tile_rows,
)
from losa_kernels.triton.scores import page_scores
from losa_kernels.triton.store import store_rows
from losa_kernels.triton.unite import page_lists
from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.attention.device_group import DeviceGroup, stored_tiles
from losa_runtime.attention.questions import (
    ActiveRules,
    AttnParts,
    AttnState,
    KVIndices,
    PageChoice,
    PerSegment,
    PrefixPlan,
    PrefixState,
    RenewedStates,
    RowGroup,
    Rows,
    ScoreKind,
    SelectedPages,
)
from losa_runtime.cache.kv_pool import KVPool, Summary

LEAST_CAPABILITY = (8, 0)
MAX_SINGLE_DIM = 64  # the largest head of which float32 tiles fit into the registers
MOST_SPLITS = 8  # of the longest context, where results must not depend on the batch: what bounds the memory of parts


class DeviceBackend(AttentionBackend):
    """See `AttentionBackend`. On a CPU it serves tests, in Triton's interpreter."""

    recordable: ClassVar[bool] = True
    kernels: ClassVar[Literal["torch", "native", "triton"]] = "triton"

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        scale: float | None = None,
        same_bits: bool = False,
        context_length: int | None = None,
    ) -> None:
        super().__init__(pool, num_heads, scale, same_bits, context_length)
        self._share = num_heads // pool.num_kv_heads
        self._layers = [self._pages(layer) for layer in range(pool.num_layers)]
        self._filled = torch.zeros(pool.num_pages, dtype=torch.int32, device=pool.device) if pool.summaries else None
        self._processors = processors_of(pool.device)
        # Groups of the running forward.
        self._blocks: WeakKeyDictionary[RowGroup, DeviceGroup] = WeakKeyDictionary()
        self._stored: WeakKeyDictionary[RowGroup, Tiles] = WeakKeyDictionary()

    @classmethod
    def supports(cls, config: BackendConfig) -> str | None:
        if config.device.type == "cuda":
            found = torch.cuda.get_device_capability(config.device)
            if found < LEAST_CAPABILITY:
                return f"compute capability {found[0]}.{found[1]}, at least {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        elif config.device.type != "cpu" or not triton.knobs.runtime.interpret:
            return f"it runs on GPUs, not on {config.device} (in tests: by Triton's interpreter, TRITON_INTERPRET=1)"
        for dtype in (config.dtype, config.kv_dtype):
            if dtype not in FLOATS:
                return f"no kernels for {dtype}"
        most = MAX_SINGLE_DIM if torch.float32 in (config.dtype, config.kv_dtype) else MAX_HEAD_DIM
        if config.head_dim > most:
            return f"head dim {config.head_dim}, allowed: up to {MAX_SINGLE_DIM} in float32, else up to {MAX_HEAD_DIM}"
        if not holds_peaks(config.page_size, config.head_dim, config.kv_dtype.itemsize):
            return f"page size {config.page_size}, allowed: divisors of {MAX_KEYS}, smaller ones for large heads"
        if not fits(config.block_length, config.head_dim, config.dtype):
            return f"block length {config.block_length} is too large for head dim {config.head_dim} in {config.dtype}"
        return config.misfit()

    def prepare(self, group: RowGroup) -> None:
        if group.segments[0].mode.stores:
            self._tiles(group)
        else:
            self._group(group)

    def refresh(self, group: RowGroup, fresh: RowGroup) -> None:
        self._group(group).refresh(self._group(fresh))

    def store_kv(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, locations_T: Tensor) -> None:
        store_rows(self._layers[layer], k_TGD.contiguous(), v_TGD.contiguous(), locations_T, self._filled)

    def prefill(self, layer: int, q_RHD: Tensor, group: RowGroup) -> Tensor:
        tiles, pages = self._tiles(group), self._layers[layer]
        chunk = self._chunk(tiles.tile_T5.shape[0] * pages.kv_heads, tiles.longest)
        parts = attend_stored(q_RHD.contiguous(), tiles, pages, self.scale, group.block_length, chunk)
        return merge_parts(parts)[0] if parts.out.shape[0] > 1 else parts.out[0]  # no row is without keys

    def prefix(self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        device_group = self._group(group)
        segments, planned = device_group.segments, device_group.planned(plan.rows)
        lists = self._lists(plan, group, device_group)
        owners, heads, most = segments.count, self.pool.num_kv_heads, segments.longest
        if lists is not None:
            owners, heads, most = planned.room if lists.per_row else owners, lists.heads, lists.most
        parts = attend_prefix(
            q_RHD.contiguous(),
            planned,
            self._layers[layer],
            segments,
            self.scale,
            lists,
            self._chunk(owners * heads, most),
            plan.peaks,
        )
        return AttnParts(*parts, planned)

    def block(self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup) -> AttnState:
        rows = (q_RHD.contiguous(), k_RGD.contiguous(), v_RGD.contiguous())
        return AttnState(*attend_block(*rows, group.block_length, self.scale))

    def merge(self, a: AttnState, b: AttnState) -> Tensor:
        return merge_states(*a, *b)[0]

    def settle(self, prefix: PrefixState | RenewedStates) -> AttnState:
        if isinstance(prefix, AttnParts):
            return AttnState(*merge_parts(Parts(*prefix[:2]), prefix.rows))
        if isinstance(prefix, RenewedStates) and isinstance(prefix.rows, Planned):
            order_R = prefix.rows.order
            place_R, fresh = order_R.clamp(min=0), self.settle(prefix.fresh)
            counts_RH = (order_R >= 0)[:, None].expand(-1, self.num_heads)
            if prefix.heads_nH is not None:
                counts_RH = counts_RH & prefix.heads_nH[place_R]
            every = AttnState(*(x[place_R] for x in fresh))
            prefix = RenewedStates(prefix.kept, prefix.place_R, None, every, counts_RH)
        return super().settle(prefix)

    def block_merged(
        self, prefix: PrefixState | RenewedStates, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup
    ) -> Tensor:
        kept, fresh, device_group = None, None, self._group(group)
        if isinstance(prefix, AttnParts):
            fresh = Fresh(Parts(*prefix[:2]), prefix.rows)
        elif isinstance(prefix, AttnState):
            kept = Kept(*prefix, device_group.every.rows)
        else:
            kept = Kept(*prefix.kept, prefix.place_R)
            parts = prefix.fresh[:2] if isinstance(prefix.fresh, AttnParts) else (x[None] for x in prefix.fresh)
            fresh = Fresh(Parts(*parts), device_group.planned(prefix.rows), prefix.heads_nH)
        rows = (q_RHD.contiguous(), k_RGD.contiguous(), v_RGD.contiguous())
        return finish_block(*rows, group.block_length, self.scale, kept, fresh)

    def kv_scores(
        self, layer: int, q_RHD: Tensor, rows: Tensor, kind: ScoreKind, granule: int, group: RowGroup
    ) -> Tensor:
        assert kind is ScoreKind.BOUND and granule == self.pool.page_size, (kind, granule)
        device_group = self._group(group)
        planned, nowhere = device_group.planned(rows), device_group.flags((False,) * len(group.segments))
        where = (self._layers[layer], device_group.segments, nowhere)
        return page_scores(q_RHD.contiguous(), planned, *where, share="none")

    def prefix_mass(
        self,
        layer: int,
        q_RHD: Tensor,
        lse_RH: Tensor,
        granule: int,
        group: RowGroup,
        over_rows: Literal["mean", "max"] = "mean",
    ) -> Tensor:
        rows = (q_RHD.contiguous(), lse_RH.contiguous())
        segments = self._group(group).segments
        return mass.prefix_mass(*rows, self._layers[layer], segments, self.scale, granule, over_rows)

    def select_pages(
        self,
        layer: int,
        q_RHD: Tensor,
        rows: Rows | None,
        whole: tuple[bool, ...],
        best: PerSegment,
        group: RowGroup,
        choice: PageChoice = PageChoice(),  # noqa: B008 - immutable
        heads_nH: Tensor | None = None,
    ) -> SelectedPages:
        device_group, page = self._group(group), self.pool.page_size
        segments, planned = device_group.segments, device_group.planned(rows)
        pages, skipped = self._layers[layer], device_group.flags(whole)
        scores_nEP = page_scores(q_RHD.contiguous(), planned, pages, segments, skipped, choice.share, heads_nH)
        context_pages = -(-self.context_length // page)
        asked = (page, best.device_S, skipped, context_pages, heads_nH)
        bars = page_bars(scores_nEP, planned, segments, *asked)
        most_S = _most_pages(group, page, whole, best, planned, choice.per_row)
        owners = planned.most or (group.block_length,) * len(most_S)
        total = sum(n * (count if choice.per_row else 1) for n, count in zip(most_S, owners, strict=True))
        room = (scores_nEP.shape[1] * total, max(most_S) * page)
        lists = page_lists(scores_nEP, bars, planned, segments, page, skipped, *room, choice.per_row)
        kv = KVIndices(lists.indptr, lists.indices, lists.heads, whole, choice.per_row, max(most_S))
        return SelectedPages(kv, tuple(not all_ for all_ in whole))

    def changed_rows(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, group: RowGroup
    ) -> Planned:
        active_R1 = self._changed(q_SBHD, before_XBHD, slots_S, rules, group, per_head=False)
        return plan_rows(active_R1, group.block_length, rules.most)

    def changed_heads(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, group: RowGroup
    ) -> Tensor:
        return self._changed(q_SBHD, before_XBHD, slots_S, rules, group, per_head=True)

    def _changed(
        self,
        q_SBHD: Tensor,
        before_XBHD: Tensor,
        slots_S: Tensor,
        rules: ActiveRules,
        group: RowGroup,
        per_head: bool,
    ) -> Tensor:
        """Which rows, or which of their heads, are recomputed: bool [R, 1] or [R, H]; notes the queries."""
        now_RHD, fresh_S = q_SBHD.flatten(0, 1).contiguous(), self._group(group).flags(rules.fresh)
        change = query_change(now_RHD, before_XBHD, slots_S, fresh_S, per_head, replace=not rules.keep_stable)
        active = active_rows(change, rules.count_S, rules.tau_S, fresh_S)
        if rules.keep_stable:
            keep_changed(now_RHD, before_XBHD, slots_S, active)
        return active

    def _lists(self, plan: PrefixPlan, group: RowGroup, device_group: DeviceGroup) -> Lists | None:
        """The lists of a plan, with a bound on the keys that any row reads."""
        kv, granule = plan.kv, plan.granule
        if kv is None:
            return None
        longest = max((n for n, all_ in zip(group.prefix_lens, kv.whole, strict=True) if all_), default=0)
        listed = kv.indices.shape[0] if kv.most is None else kv.most
        listed = min(listed, -(-max(group.prefix_lens) // granule))
        about = (kv.heads, granule, device_group.flags(kv.whole), max(longest, listed * granule), kv.per_row)
        return Lists(kv.indptr.contiguous(), kv.indices.contiguous(), *about)

    def _chunk(self, programs: int, most: int) -> int:
        """Keys of a split. programs: those of one split; most: keys of the longest list."""
        if not self.same_bits:
            return filling_chunk(programs, most, self._processors)
        return max(CHUNK, -(-self.context_length // (MOST_SPLITS * MAX_KEYS)) * MAX_KEYS)

    def _pages(self, layer: int) -> Pages:
        bounds, moments = (
            self.pool.summary(layer, kind) if kind in self.pool.summaries else None
            for kind in (Summary.KEY_BOUNDS, Summary.KEY_MOMENTS)
        )
        return Pages(self.pool.k(layer), self.pool.v(layer), bounds, moments)

    def _group(self, group: RowGroup) -> DeviceGroup:
        found = self._blocks.get(group)
        if found is None:
            found = self._blocks[group] = DeviceGroup(group, self.pool.device)
        return found

    def _tiles(self, group: RowGroup) -> Tiles:
        found = self._stored.get(group)
        if found is None:
            # Whatever the size, a row sees the same; but products of other sizes may be summed in another order.
            folded = MAX_TILE_ROWS if self.same_bits else max(group.counts) * self._share
            size = tile_rows(folded, self.pool.head_dim)
            found = self._stored[group] = stored_tiles(group, self._share, size, self.pool.device)
        return found


def processors_of(device: torch.device) -> int:
    """Those that run programs side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _most_pages(
    group: RowGroup, page: int, whole: tuple[bool, ...], best: PerSegment, planned: Planned, per_row: bool
) -> list[int]:
    """A bound on the pages of each segment's longest list."""
    rows = (1,) * len(whole) if per_row else planned.most or (group.block_length,) * len(whole)
    about = zip(group.prefix_lens, whole, best.host, rows, strict=True)
    return [0 if all_ else min(-(-n // page), count * taken) for n, all_, taken, count in about]
