"""How attention is computed: the interface of the backends. What they are asked: `questions`; their table: `registry`.

A backend sees groups of segments and page lists. It does not know why a list was chosen, nor any request.
T rows of the batch, R rows of a group, S segments, B block length, H query heads, G KV heads, D head dim, P pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.reference import paging, selection
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
from losa_runtime.core.batch import Segment


class BackendConfig(NamedTuple):
    """What a backend is asked to serve. dtype: of q, k, v; kv_dtype: of the pages. same_bits: a row gets the same bits
    in every company and however its prompt is cut, also where that is slower. context_length: most tokens of a request
    (None: as many as there are pages for)."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    block_length: int
    same_bits: bool = False
    context_length: int | None = None

    def misfit(self) -> str | None:
        """Why no backend can serve these sizes, or None."""
        small, large = sorted((self.page_size, self.block_length))
        if large % small:
            return f"page size {self.page_size} and block length {self.block_length} must divide one another"
        if self.num_heads % self.num_kv_heads:
            return f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads"
        return None


class AttentionBackend(ABC):
    """Attention over one page pool. The softmax scale is fixed for the life of the backend.

    A segment's result is computed from its own rows and pages alone: with `same_bits` to the bit, otherwise its sums
    may be cut as the company makes it worth while.
    What is not abstract here is made of the other methods or of the reference; a backend may do it in one go.
    kernels: the room of `losa_kernels` that computes for it, which may then compute a model's experts, too.
    """

    kernels: ClassVar[Literal["torch", "native", "triton"]] = "torch"

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        scale: float | None = None,
        same_bits: bool = False,
        context_length: int | None = None,
    ) -> None:
        assert num_heads % pool.num_kv_heads == 0
        self.pool, self.num_heads, self.same_bits = pool, num_heads, same_bits
        self.scale = pool.head_dim**-0.5 if scale is None else scale
        self.context_length = context_length or pool.num_pages * pool.page_size

    @classmethod
    @abstractmethod
    def supports(cls, config: BackendConfig) -> str | None:
        """None, or the reason why this backend cannot serve `config`."""

    @classmethod
    def own_bytes(cls, config: BackendConfig) -> int:
        """Memory that it takes for good, beside the pages."""
        return 0

    @property
    def detail(self) -> str:
        """What else is worth a word in the log, such as the instruction set. May be empty."""
        return ""

    recordable: ClassVar[bool] = False
    """Whether a forward over prepared groups of block segments can be recorded and run again, with bounds on what
    varies known to the host and the rest on the device, where `refresh` changes it."""

    def prepare(self, group: RowGroup) -> None:  # noqa: B027 - a backend may have nothing to prepare
        """Called once for a group, before its first layer: the time to bring to the device what the host says of it."""

    def refresh(self, group: RowGroup, fresh: RowGroup) -> None:
        """Write to what was prepared for a group what was prepared for another one of the same shape: as many segments,
        page tables of the same lengths, prefixes that are not longer. Only where `recordable`."""
        raise NotImplementedError

    @abstractmethod
    def store_kv(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, locations_T: Tensor) -> None:
        """Write the K/V of store rows and bring the declared summaries of the touched pages up to date.

        locations_T: page * page_size + offset. A summary covers exactly the offsets up to the last one stored.
        """

    @abstractmethod
    def prefill(self, layer: int, q_RHD: Tensor, group: RowGroup) -> Tensor:
        """Block-causal attention of stored rows, read from the pages: out [R, H, D].

        Also a row's own block is read as it was stored, so that the result is the same however the prompt is cut: to
        rounding, and with `same_bits` to the bit.
        """

    @abstractmethod
    def prefix(self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        """Attention of the planned rows to what the plan lists of their prefixes: float32, in the order of the rows."""

    @abstractmethod
    def block(self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup) -> AttnState:
        """Bidirectional attention of each block to itself, float32. Every segment of the group is one block."""

    @abstractmethod
    def merge(self, a: AttnState, b: AttnState) -> Tensor:
        """Attention over the keys of both, which are disjoint: out [R, H, D] float32."""

    @abstractmethod
    def kv_scores(
        self, layer: int, q_RHD: Tensor, rows: Tensor, kind: ScoreKind, granule: int, group: RowGroup
    ) -> Tensor:
        """Scores of the prefix granules for some rows and all query heads: float32 [len(rows), H, P].

        rows: int64, sorted rows of the group. P is the most granules of any scored segment; padding is -inf.
        """

    def settle(self, prefix: PrefixState | RenewedStates) -> AttnState:
        """Of what `prefix` answered: the state of each row of the plan. Of renewed states: the prefix attention of all
        rows, float32; fresh states are remembered from here on.
        """
        if isinstance(prefix, RenewedStates):
            fresh, rows = self.settle(prefix.fresh), known(prefix.rows)
            return AttnState(*ref.renew_states(*prefix.kept, prefix.place_R, *fresh, rows, prefix.heads_nH))
        assert isinstance(prefix, AttnState), "parts are for the backend that made them"
        return prefix

    def block_merged(
        self, prefix: PrefixState | RenewedStates, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup
    ) -> Tensor:
        """In-block attention merged with that to the prefix, which is settled: out [R, H, D], float32 or in the dtype
        of q.
        """
        return self.merge(self.settle(prefix), self.block(q_RHD, k_RGD, v_RGD, group))

    def prefix_mass(
        self,
        layer: int,
        q_RHD: Tensor,
        lse_RH: Tensor,
        granule: int,
        group: RowGroup,
        over_rows: Literal["mean", "max"] = "mean",
    ) -> Tensor:
        """Softmax mass of each prefix granule per query head, over all rows of a segment: float32 [S, H, n], 0 behind
        a segment's last granule; n is the most granules of any segment.

        exp(scale q . k - lse), summed over the keys of a granule, then averaged (or maximised) over the rows. lse_RH:
        whatever the mass is to be relative to, natural and float32; that of the prefix makes the mean sum to one.
        """
        segments, rows, prefixes = len(group.segments), group.block_length, group.prefix_lens
        assert q_RHD.shape[0] == segments * rows
        width = max(-(-n // granule) for n in prefixes)
        mass_SHn = torch.zeros(segments, self.num_heads, width, device=q_RHD.device)
        for index, (segment, prefix_len) in enumerate(zip(group.segments, prefixes, strict=True)):
            mine = slice(index * rows, (index + 1) * rows)
            keys_GND = self.prefix_keys(layer, segment)
            mass = selection.key_mass(q_RHD[mine], lse_RH[mine], keys_GND, self.scale, granule, over_rows)
            mass_SHn[index, :, : -(-prefix_len // granule)] = mass
        return mass_SHn

    def prefix_keys(self, layer: int, segment: Segment) -> Tensor:
        """All stored keys before a segment, gathered: [G, N, D] in the dtype of the pages."""
        pages = segment.pages[: -(-segment.prefix_len // self.pool.page_size)]
        return paging.gather_pages(self.pool.k(layer), pages)[:, : segment.prefix_len]

    def page_moments(self, layer: int, segment: Segment, spread: bool = True) -> Tensor:
        """Mean and, with `spread`, mean squared deviation of the keys in each page before a segment, gathered: float32
        [P, G, 2 or 1, D]. They cover what is stored, so the segment has to follow its last page's last stored key.
        """
        pages = segment.pages[: -(-segment.prefix_len // self.pool.page_size)]
        return self.pool.summary(layer, Summary.KEY_MOMENTS)[pages, :, : 1 + spread]

    def keys_at(self, layer: int, segment: Segment, positions_GN: Tensor) -> Tensor:
        """The keys at some prefix positions per KV head, gathered: [G, n, D] in the dtype of the pages."""
        kv_heads = self.pool.num_kv_heads
        heads = torch.arange(kv_heads, device=positions_GN.device)
        place = paging.position_rows(segment.pages, positions_GN, heads, kv_heads, self.pool.page_size)
        return paging.gather_rows(self.pool.k(layer), place)

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
        """The best[s] pages with the best bounds of each of the n rows (None: all), in the lists that `choice` says.

        heads_nH: bool, the query heads of each row that take part (None: all); a list without any stays empty.
        Segments in `whole` are not scored. Ties go to the lowest page.
        """
        kv_heads, segments = self.pool.num_kv_heads, len(whole)
        planned_n = known(rows)
        if planned_n is None:
            planned_n = torch.arange(q_RHD.shape[0], device=q_RHD.device)
        segment_n = planned_n // group.block_length
        scored_n = ~torch.tensor(whole, device=q_RHD.device)[segment_n]
        scored, segment_R = planned_n[scored_n], segment_n[scored_n]
        if scored.shape[0] == 0:
            lists = self.num_heads if choice.share == "none" else kv_heads
            owners = planned_n.shape[0] if choice.per_row else segments
            nothing = torch.zeros(owners, lists, 0, dtype=torch.bool, device=q_RHD.device)
            return SelectedPages(KVIndices.from_mask(nothing, whole, choice.per_row), (False,) * segments)
        heads_RH = None if heads_nH is None else heads_nH[scored_n]
        scores_RHP = self.kv_scores(layer, q_RHD, scored, ScoreKind.BOUND, self.pool.page_size, group)
        scores_REP = selection.share_scores(scores_RHP, kv_heads, choice.share, heads_RH)
        chosen_REP = selection.top_pages(scores_REP, best.device_S[segment_R])
        if heads_RH is not None:
            chosen_REP &= selection.share_heads(heads_RH, kv_heads, choice.share)[..., None]
        if choice.per_row:
            chosen_OEP = chosen_REP.new_zeros(planned_n.shape[0], *chosen_REP.shape[1:])
            chosen_OEP[scored_n] = chosen_REP
        else:
            chosen_OEP = selection.union_rows(chosen_REP, segment_R, segments)
        seen = torch.bincount(segment_R, minlength=segments).tolist()
        kv = KVIndices.from_mask(chosen_OEP, whole, choice.per_row)
        return SelectedPages(kv, tuple(count > 0 for count in seen))

    def changed_rows(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, group: RowGroup
    ) -> Rows:
        """Rows to recompute. before_XBHD[slots_S], earlier queries, is compared with and becomes q_SBHD; with
        keep_stable only where the row is to be recomputed, so that the next change is measured from there.
        """
        now_SB1W, before_XB1W = q_SBHD.flatten(2).unsqueeze(2), before_XBHD.view(*before_XBHD.shape[:2], 1, -1)
        return self.changed_heads(now_SB1W, before_XB1W, slots_S, rules, group).flatten().nonzero().flatten()

    def changed_heads(
        self, q_SBHD: Tensor, before_XBHD: Tensor, slots_S: Tensor, rules: ActiveRules, group: RowGroup
    ) -> Tensor:
        """`changed_rows` with the rules applied to each query head by itself: bool [R, H]."""
        segments, length, heads, _ = q_SBHD.shape
        later_S = torch.tensor([i for i, first in enumerate(rules.fresh) if not first], device=q_SBHD.device)
        active_SBH = torch.ones(segments, length, heads, dtype=torch.bool, device=q_SBHD.device)
        if later_S.shape[0]:
            change_SBH = selection.query_change(q_SBHD[later_S], before_XBHD[slots_S[later_S]], per_head=True)
            shares = (rule_S[later_S].repeat_interleave(heads) for rule_S in (rules.count_S, rules.tau_S))
            active_YB = selection.active_rows(change_SBH.transpose(1, 2).reshape(-1, length), *shares)
            active_SBH[later_S] = active_YB.view(-1, heads, length).transpose(1, 2)
        if rules.keep_stable:
            before_XBHD[slots_S] = torch.where(active_SBH[..., None], q_SBHD, before_XBHD[slots_S])
        else:
            before_XBHD[slots_S] = q_SBHD
        return active_SBH.flatten(0, 1)
