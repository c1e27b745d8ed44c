"""The reference backend: torch operations, segment by segment, on any device.

Slow where a fused kernel would be fast, but never wasteful: heads of a KV group are folded into rows, the CPU's flash
operation is used where there is one, and K/V is gathered once per segment. Everything is computed in float32.
R rows, H query heads, G KV heads, D head dim, N positions, E lists, P pages, X rows with folded heads.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.reference import paging, selection
from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.attention.questions import AttnState, KVIndices, PrefixPlan, RowGroup, ScoreKind
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.batch import Segment

SUMMARISE = {Summary.KEY_BOUNDS: paging.key_bounds, Summary.KEY_MOMENTS: paging.key_moments}
PREFILL_TILE = 256  # query rows that share one mask; bounds the mask's memory at long prefixes; one block if same_bits


class TorchBackend(AttentionBackend):
    """See `AttentionBackend`; K/V of any floating dtype, block length and page size of any proportion."""

    @classmethod
    def supports(cls, config: BackendConfig) -> str | None:
        return config.misfit()

    def store_kv(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, locations_T: Tensor) -> None:
        keys = self.pool.k(layer)
        paging.store_rows(keys, k_TGD, locations_T)
        paging.store_rows(self.pool.v(layer), v_TGD, locations_T)
        if self.pool.summaries:
            pages, filled = paging.touched_pages(locations_T, self.pool.page_size)
            touched = keys[pages]
            for kind in self.pool.summaries:
                self.pool.summary(layer, kind)[pages] = SUMMARISE[kind](touched, filled)

    def prefill(self, layer: int, q_RHD: Tensor, group: RowGroup) -> Tensor:
        out_RHD = torch.empty_like(q_RHD)
        for segment, start, count in zip(group.segments, group.starts, group.counts, strict=True):
            k_GND, v_GND = (x.float() for x in self._whole(layer, segment, segment.prefix_len + count))
            tile = group.block_length if self.same_bits else PREFILL_TILE
            for first, last in _tiles(segment.prefix_len, count, group.block_length, tile):
                rows = slice(start + first - segment.prefix_len, start + last - segment.prefix_len)
                seen = (k_GND[:, :last], v_GND[:, :last])
                out_RHD[rows] = self._tile(q_RHD[rows], *seen, group.block_length).to(out_RHD.dtype)
        return out_RHD

    def prefix(self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
        rows = plan.known_rows
        q = q_RHD if rows is None else q_RHD[rows]
        out = AttnState(
            torch.zeros(q.shape, dtype=torch.float32, device=q.device),
            torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device),
        )
        done = 0
        if plan.peaks is not None:
            plan.peaks.fill_(-torch.inf)
        for index, count in enumerate(_planned_rows(plan, group)):
            if count and group.segments[index].prefix_len:
                mine = slice(done, done + count)
                out.out_RHD[mine], out.lse_RH[mine] = self._segment_prefix(layer, q[mine], plan, group, index, done)
                if plan.peaks is not None and (plan.kv is None or plan.kv.whole[index]):
                    keys = self.prefix_keys(layer, group.segments[index])
                    found = selection.page_peaks(q[mine], keys, self.scale, self.pool.page_size)
                    plan.peaks[mine, :, : found.shape[-1]] = found
            done += count
        return out

    def block(self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup) -> AttnState:
        rows, heads, dim = q_RHD.shape
        segments, length, kv_heads = len(group.segments), group.block_length, k_RGD.shape[1]
        assert rows == segments * length
        q = q_RHD.view(segments, length, kv_heads, -1, dim).transpose(1, 2).reshape(segments, kv_heads, -1, dim)
        k, v = (x.reshape(segments, length, kv_heads, dim).transpose(1, 2) for x in (k_RGD, v_RGD))
        out, lse = self._softmax(q, k, v)
        out = out.reshape(segments, kv_heads, length, -1, dim).transpose(1, 2).reshape(rows, heads, dim)
        return AttnState(out, lse.reshape(segments, kv_heads, length, -1).transpose(1, 2).reshape(rows, heads))

    def merge(self, a: AttnState, b: AttnState) -> Tensor:
        return ref.merge_states(*a, *b)[0]

    def kv_scores(
        self, layer: int, q_RHD: Tensor, rows: Tensor, kind: ScoreKind, granule: int, group: RowGroup
    ) -> Tensor:
        assert kind is ScoreKind.BOUND and granule == self.pool.page_size, (kind, granule)
        bounds = self.pool.summary(layer, Summary.KEY_BOUNDS)
        counts = torch.bincount(rows // group.block_length, minlength=len(group.segments)).tolist()
        needed = [-(-n // granule) if count else 0 for n, count in zip(group.prefix_lens, counts, strict=True)]
        scores = torch.full((rows.shape[0], q_RHD.shape[1], max(needed)), -torch.inf, device=q_RHD.device)
        q, done = q_RHD[rows], 0
        for segment, count, pages in zip(group.segments, counts, needed, strict=True):
            if count:
                mine = slice(done, done + count)
                scores[mine, :, :pages] = selection.page_scores(q[mine], bounds[segment.pages[:pages]])
            done += count
        return scores

    def _whole(self, layer: int, segment: Segment, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions of a request: k, v [G, length, D] in the pool's dtype."""
        pages = segment.pages[: -(-length // self.pool.page_size)]
        caches = (self.pool.k(layer), self.pool.v(layer))
        k, v = (paging.gather_pages(cache, pages)[:, :length] for cache in caches)
        return k, v

    def _tile(self, q_RHD: Tensor, k_GND: Tensor, v_GND: Tensor, block_length: int) -> Tensor:
        """Block-causal attention of the last R of N positions, whole blocks: out [R, H, D] float32."""
        rows, (groups, end) = q_RHD.shape[0], k_GND.shape[:2]
        if rows == block_length:  # a single block sees all that is there
            folded = self._softmax(ref.fold_heads(q_RHD, groups)[None], k_GND[None], v_GND[None])
            return ref.unfold_heads(folded[0][0], folded[1][0], rows)[0]
        block_of = torch.arange(end, device=q_RHD.device) // block_length
        bias = torch.zeros(rows, end, device=q_RHD.device)
        bias.masked_fill_(block_of[end - rows :, None] < block_of, -torch.inf)
        return self._softmax(q_RHD.transpose(0, 1)[None], k_GND[None], v_GND[None], bias)[0][0].transpose(0, 1)

    def _segment_prefix(
        self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup, index: int, first: int
    ) -> tuple[Tensor, Tensor]:
        """One segment's planned rows; `first` is their place among all planned rows."""
        segment, kv = group.segments[index], plan.kv
        if kv is None or kv.whole[index]:
            k, v = self._whole(layer, segment, segment.prefix_len)
            folded = self._softmax(ref.fold_heads(q_RHD, k.shape[0])[None], k[None], v[None])
            return ref.unfold_heads(folded[0][0], folded[1][0], q_RHD.shape[0])
        if not kv.per_row:
            return self._listed(layer, q_RHD, kv, index, plan.granule, segment)
        rows = range(q_RHD.shape[0])
        each = [self._listed(layer, q_RHD[r : r + 1], kv, first + r, plan.granule, segment) for r in rows]
        return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])

    def _listed(
        self, layer: int, q_RHD: Tensor, kv: KVIndices, owner: int, granule: int, segment: Segment
    ) -> tuple[Tensor, Tensor]:
        """Attention to the lists of one owner. Padding re-reads position 0, which is stored, and weighs nothing."""
        positions_EN, listed_EN = _positions(kv, owner, granule, segment.prefix_len)
        if positions_EN.shape[1] == 0:
            return torch.zeros_like(q_RHD, dtype=torch.float32), q_RHD.new_full(q_RHD.shape[:2], -torch.inf).float()
        kv_heads = self.pool.num_kv_heads
        of_head = torch.arange(kv.heads, device=q_RHD.device) * kv_heads // kv.heads
        place = paging.position_rows(segment.pages, positions_EN, of_head, kv_heads, self.pool.page_size)
        k, v = (paging.gather_rows(cache, place)[None] for cache in (self.pool.k(layer), self.pool.v(layer)))
        q = ref.fold_heads(q_RHD, kv.heads)[None]
        if bool(listed_EN.all()):
            out, lse = self._softmax(q, k, v)
        else:
            bias = torch.zeros(listed_EN.shape, device=q.device).masked_fill_(~listed_EN, -torch.inf)
            out, lse = self._softmax(q, k, v, bias[None, :, None, :])
            lse = lse.masked_fill(~listed_EN.any(-1)[None, :, None], -torch.inf)
        return ref.unfold_heads(out[0], lse[0], q_RHD.shape[0])

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 attention of q [S, H, R, D] to k, v [S, G, N, D], N > 0, with an additive 0 / -inf bias.

        The CPU's flash operation gives 0 instead of -inf as the lse of a row without keys: the caller corrects it.
        """
        q, k, v = q.float(), k.float(), v.float()
        if _flash(q):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias, scale=self.scale
            )
            return out, lse
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return ref.attend(q, k, v, self.scale, None if bias is None else bias == 0.0)


def _flash(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _tiles(prefix_len: int, count: int, block_length: int, most: int) -> list[tuple[int, int]]:
    """Position ranges of at most `most` rows (at least a block) in whole blocks. Inner edges are multiples of the tile,
    counted from position 0, so they do not move with the cut of a chunk; the outer ones do, and with them the shapes
    that decide how sums are rounded.
    """
    tile = max(1, most // block_length) * block_length
    end = prefix_len + count
    edges = [prefix_len, *range((prefix_len // tile + 1) * tile, end, tile), end]
    return list(pairwise(edges))


def _planned_rows(plan: PrefixPlan, group: RowGroup) -> list[int]:
    """Planned rows per segment."""
    rows = plan.known_rows
    if rows is None:
        return list(group.counts)
    counts: list[int] = torch.bincount(rows // group.block_length, minlength=len(group.segments)).tolist()
    return counts


def _positions(kv: KVIndices, owner: int, granule: int, prefix_len: int) -> tuple[Tensor, Tensor]:
    """The lists of one owner as padded positions: int64 [E, n] and the bool [E, n] that says which are real."""
    ends = kv.indptr[owner * kv.heads : (owner + 1) * kv.heads + 1]
    sizes = ends.diff()
    place = torch.arange(int(sizes.max()), device=ends.device)
    real = place < sizes[:, None]
    granules = torch.zeros_like(real, dtype=torch.int64)
    granules[real] = kv.indices[int(ends[0]) : int(ends[-1])]
    positions = (granules[..., None] * granule + torch.arange(granule, device=ends.device)).flatten(1)
    listed = real.repeat_interleave(granule, dim=1) & (positions < prefix_len)
    return positions.masked_fill(~listed, 0), listed
