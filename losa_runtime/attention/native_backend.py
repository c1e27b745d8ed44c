"""The CPU backend in C++: one call per question for all segments of a group, on torch's number of threads.

Reads K/V from the pages where they lie, in their dtype; queries, arithmetic and results are float32. Keys are cut into
chunks of fixed size, so a result does not depend on the batch, the number of threads, or how a prompt was cut.
R rows, S segments, H query heads, G KV heads, D head dim, X slots.
"""

from __future__ import annotations

import os
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from losa_kernels.native import attention, mass, selection, store
from losa_kernels.native.attention import PEAK_CHUNK
from losa_kernels.native.layout import Pages, Segments
from losa_kernels.native.library import DTYPES, MAX_HEAD_DIM, Kernels, NativeUnavailable, NativeUnfit
from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.attention.questions import (
    ActiveRules,
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
    known,
)
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.errors import ConfigError


class NativeBackend(AttentionBackend):
    """See `AttentionBackend`. The best instruction set of the CPU is used, or the one named in LOSA_SIMD."""

    kernels: ClassVar[Literal["torch", "native", "triton"]] = "native"

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        scale: float | None = None,
        same_bits: bool = False,
        context_length: int | None = None,
    ) -> None:
        super().__init__(pool, num_heads, scale, same_bits, context_length)
        self._kernels = Kernels()
        self._layers = [self._pages(layer) for layer in range(pool.num_layers)]
        # Page tables of the groups of the running forward, made once for all layers.
        self._segments: WeakKeyDictionary[RowGroup, Segments] = WeakKeyDictionary()

    @classmethod
    def supports(cls, config: BackendConfig) -> str | None:
        if config.device.type != "cpu":
            return f"it runs on the CPU, not on {config.device}"
        try:
            kernels = Kernels()
        except NativeUnavailable as unavailable:
            return str(unavailable)
        except NativeUnfit as unfit:
            raise ConfigError(f"CPU kernels: {unfit}") from None
        if kernels.level == "portable" and os.environ.get("LOSA_SIMD") != "portable":
            return "this CPU has no AVX2; torch is faster (LOSA_SIMD=portable insists)"
        for dtype in (config.dtype, config.kv_dtype):
            if dtype not in DTYPES:
                return f"no kernels for {dtype}"
        if config.head_dim > MAX_HEAD_DIM:
            return f"head dim {config.head_dim}, at most {MAX_HEAD_DIM}"
        misfit = config.misfit()
        if misfit is None and PEAK_CHUNK % config.page_size:
            return f"page size {config.page_size}, allowed: divisors of {PEAK_CHUNK}"
        return misfit

    @property
    def detail(self) -> str:
        return self._kernels.level

    def store_kv(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, locations_T: Tensor) -> None:
        rows = (k_TGD.contiguous(), v_TGD.contiguous(), locations_T.contiguous())
        store.store(self._kernels, self._layers[layer], *rows)

    def prefill(self, layer: int, q_RHD: Tensor, group: RowGroup) -> Tensor:
        counts_S = torch.tensor(group.counts)
        segments, pages = self._tables(group), self._layers[layer]
        return attention.prefill(self._kernels, pages, segments, _floats(q_RHD), counts_S, self.scale)

    def prefix(self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
        lists = None if plan.kv is None else attention.Lists(*plan.kv[:4], plan.granule, plan.kv.per_row)
        where = (self._layers[layer], self._tables(group))
        q = _floats(q_RHD)
        found = attention.prefix(self._kernels, *where, q, self.scale, plan.known_rows, lists, plan.peaks)
        return AttnState(*found)

    def block(self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup) -> AttnState:
        rows = (_floats(q_RHD), _floats(k_RGD), _floats(v_RGD))
        return AttnState(*attention.block(self._kernels, *rows, group.block_length, self.scale))

    def merge(self, a: AttnState, b: AttnState) -> Tensor:
        return attention.merge(self._kernels, a, b)

    def block_merged(
        self, prefix: PrefixState | RenewedStates, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup
    ) -> Tensor:
        rows = (_floats(q_RHD), _floats(k_RGD), _floats(v_RGD))
        if isinstance(prefix, RenewedStates):
            kept, rows_n = attention.Kept(*prefix.kept, prefix.place_R), known(prefix.rows)
            fresh = attention.Fresh(*self.settle(prefix.fresh), rows_n, prefix.heads_nH)
        else:
            kept, fresh = attention.Kept(*self.settle(prefix)), None
        return attention.finish_block(self._kernels, *rows, group.block_length, self.scale, kept, fresh)

    def kv_scores(
        self, layer: int, q_RHD: Tensor, rows: Tensor, kind: ScoreKind, granule: int, group: RowGroup
    ) -> Tensor:
        assert kind is ScoreKind.BOUND and granule == self.pool.page_size, (kind, granule)
        asked = set((rows // group.block_length).tolist())
        width = max(-(-group.prefix_lens[index] // granule) for index in asked)
        where = (self._layers[layer], self._tables(group))
        return selection.page_scores(self._kernels, *where, _floats(q_RHD), rows, width)

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
        where, q = (self._layers[layer], self._tables(group)), _floats(q_RHD)
        rows, best_S = known(rows), best.device_S
        chosen = selection.select_pages(self._kernels, *where, q, rows, whole, best_S, *choice, heads_nH=heads_nH)
        kv = KVIndices(chosen.indptr, chosen.indices, chosen.heads, whole, choice.per_row)
        return SelectedPages(kv, tuple(count > 0 for count in chosen.seen))

    def changed_rows(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, group: RowGroup
    ) -> Tensor:
        return self._changed(q_SBHD, before_XBHD, slots_S, rules, per_head=False).rows

    def changed_heads(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, group: RowGroup
    ) -> Tensor:
        return self._changed(q_SBHD, before_XBHD, slots_S, rules, per_head=True).parts

    def prefix_mass(
        self,
        layer: int,
        q_RHD: Tensor,
        lse_RH: Tensor,
        granule: int,
        group: RowGroup,
        over_rows: Literal["mean", "max"] = "mean",
    ) -> Tensor:
        rows = (_floats(q_RHD), lse_RH.contiguous())
        where = (self._layers[layer], self._tables(group))
        return mass.prefix_mass(self._kernels, *where, *rows, self.scale, granule, over_rows)

    def _changed(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, per_head: bool
    ) -> selection.Changed:
        now_RHD = q_SBHD.flatten(0, 1).contiguous()
        asked = (slots_S, rules.fresh, rules.count_S, rules.tau_S, rules.keep_stable)
        return selection.changed_rows(self._kernels, now_RHD, before_XBHD, *asked, per_head=per_head)

    def _pages(self, layer: int) -> Pages:
        kinds = (Summary.KEY_BOUNDS, Summary.KEY_MOMENTS)
        kept = (self.pool.summary(layer, kind) if kind in self.pool.summaries else None for kind in kinds)
        return Pages(self.pool.k(layer), self.pool.v(layer), *kept)

    def _tables(self, group: RowGroup) -> Segments:
        found = self._segments.get(group)
        if found is None:
            tables = [segment.pages for segment in group.segments]
            ends = torch.tensor([0, *(table.shape[0] for table in tables)]).cumsum(0)
            found = Segments(ends, torch.cat(tables), torch.tensor(group.prefix_lens), group.block_length)
            self._segments[group] = found
        return found


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()
