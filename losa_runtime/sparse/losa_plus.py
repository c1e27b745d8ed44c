"""LoSA plus: the exact support of a block's first step, read afresh by the rows that moved, beside a remainder that is
remembered and moves with the query.

A method of this project, made of what the published ones do well. First step of a block, per layer:
  1. dense prefix attention for all rows; output and log-sum-exp are remembered (as LoSA does, arXiv 2604.12056),
  2. support: the budget's tokens with the largest softmax mass that any row of the block and any query head of the KV
     group gives them. One list per layer and KV head, held for the block (MAGE, arXiv 2602.14209, does so with the mean
     mass; the largest keeps what a single row needs),
  3. remainder: the attention to everything outside the support, exact: the dense state less that over the support.
Later steps, per layer:
  4. active rows: those whose query moved since their last refresh by more than `tolerance` of its length, an error
     bound instead of a fixed number; the others reuse their state. If no row is active nothing is read,
  5. active rows attend to the support afresh and are merged with their remainder. Its output stays, its log-sum-exp L
     moves with the query: L(q') = L(q) + scale (q' - q) . k, with k the softmax mean of the heaviest keys outside the
     support. For the softmax mean of all of them this is the first-order term, and as L is convex in q, a lower bound:
     a row that hardly moved keeps full-attention information, one that was unmasked is not misled by the past.
  6. search: a row that is still masked and whose query moved further than `novelty` from where it last looked over the
     whole prefix looks for what the support lacks: the budget's best pages by QUEST's bounds join the support for the
     rest of the block. Only then page summaries are read. A page's tokens keep the little weight that they have in the
     remainders (none was among the heaviest), so that weight is counted twice from then on. The
     support grows with every search and is not bounded: a block whose queries keep jumping ends up reading like QUEST.

The first step finds the support in one pass: it also reports each row's largest score per page, and only the tokens
of the best pages (`spread` times the budget, at least LEAST_PAGES pages) are scored one by one, from their keys.

S segments, B block length, R = S * B rows, H query heads, G KV heads, D head dim, P pages, N candidate positions.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from losa_kernels.reference.attention import merge_states, remove_state
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import AttnState, PrefixPlan, PrefixState, RenewedStates
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.sparse.memory import BlockMemory, Geometry, HeldLists, RowQueries, RowStates
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.step import DenoiseStep, Part
from losa_runtime.sparse.support import best_granules, candidates, page_scores

LEAST_PAGES = 64  # scored token by token, however small the budget


class LosaPlusOptions(MethodOptions):
    """tolerance: change of a query since its last refresh, relative to its length, up to which a row is reused; 0 =
    only rows whose query is the same. novelty: the same since its last look over the whole prefix, from which a masked
    row searches; 0 = never. remainder: False = active rows attend to the support alone. granule: unit of the
    support; whole pages need no scoring of tokens. spread: candidate tokens per token of the budget. least_mass: what
    no row gives more mass than this stays outside the support even if the budget has room.
    """

    tolerance: float = Field(default=0.05, ge=0.0, le=10.0)
    novelty: float = Field(default=1.0, ge=0.0, le=10.0)
    remainder: bool = True
    granule: Literal["token", "page"] = "token"
    spread: int = Field(default=4, ge=1, le=1024)
    least_mass: float = Field(default=0.001, ge=0.0, lt=1.0)


class LosaPlus(SparseMethod):
    """See the module. A prefix within the budget is read whole, by active rows."""

    Options: ClassVar[type[MethodOptions]] = LosaPlusOptions
    summaries: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_BOUNDS})

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._support = HeldLists()
        # Output of the remainder, and its log-sum-exp at a query of zero if it grew along `_mean_key` all the way.
        self._remainder, self._mean_key = RowStates(geometry), RowQueries(geometry)
        self._searched = RowQueries(geometry)  # with which each row last looked over the whole prefix

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        rows = self._active_rows(layer, q_RHD, step)
        whole = tuple(first or covered for first, covered in zip(step.opens, step.whole, strict=True))
        peaks = self._room_for_peaks(q_RHD, rows, step)
        if all(whole):
            return PrefixPlan(rows, peaks=peaks)
        scored = self._search(layer, q_RHD, rows, whole, step, backend)
        lists = self._support.lists(layer, step.slots, whole)
        return PrefixPlan(rows, lists, self._granule(step), scored, peaks)

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> RenewedStates:
        got = backend.settle(got)
        if plan.kv is not None and _options(step).remainder:
            got = self._with_remainder(layer, q_RHD, plan, got, step, backend.scale)
        part = step.part(_selecting(step))
        if part is not None:
            self._open(layer, q_RHD, plan, got, part, step, backend)
        return self.memory.renew(layer, plan.rows, got, step)

    @classmethod
    def state_bytes(cls, geometry: Geometry, itemsize: int) -> int:
        return RowStates.bytes(geometry) + 2 * RowQueries.bytes(geometry, itemsize)

    def release(self, slot: int) -> None:
        super().release(slot)
        self._support.close(slot)

    def _granule(self, step: DenoiseStep) -> int:
        return 1 if _options(step).granule == "token" else self.geometry.page_size

    # -- later steps ------------------------------------------------------------------------------------------------

    def _active_rows(self, layer: int, q_RHD: Tensor, step: DenoiseStep) -> Tensor | None:
        """Rows to recompute, int64 sorted (None: all); their queries become the reference of the next change."""
        q_SBHD = q_RHD.view(len(step.slots), self.geometry.block_length, *q_RHD.shape[1:])
        refreshed_XBHD, searched_XBHD = self.memory.query(layer, q_RHD), self._searched.of_layer(layer, q_RHD)
        for index, slot in enumerate(step.slots):
            if step.opens[index]:
                refreshed_XBHD[slot] = searched_XBHD[slot] = q_SBHD[index]
        if all(step.opens):
            return None
        before_SBHD = refreshed_XBHD[step.slots_S]
        active_SB = _distance(q_SBHD, before_SBHD) > _options(step).tolerance
        active_SB |= step.tensor(step.opens, torch.bool)[:, None]
        refreshed_XBHD[step.slots_S] = torch.where(active_SB[..., None, None], q_SBHD, before_SBHD)
        return active_SB.flatten().nonzero().flatten()

    def _search(
        self,
        layer: int,
        q_RHD: Tensor,
        rows: Tensor | None,
        whole: tuple[bool, ...],
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> tuple[bool, ...] | None:
        """Let rows that moved far add pages to the supports; per segment, whether bounds were read (None: nowhere)."""
        novelty = _options(step).novelty
        if not novelty or rows is None or not rows.shape[0]:
            return None
        searched_RHD = self._searched.of_layer(layer, q_RHD).flatten(0, 1)
        far = _distance(q_RHD[rows], searched_RHD[step.place_R[rows]]) > novelty
        segment_n = rows // self.geometry.block_length
        far &= step.masked_SB.flatten()[rows] & ~step.tensor(whole, torch.bool)[segment_n]
        looking = rows[far]
        if not looking.shape[0]:
            return None
        searched_RHD[step.place_R[looking]] = q_RHD[looking]
        found = backend.select_pages(layer, q_RHD, looking, whole, step.best(self.geometry.page_size), step.group)
        for index in sorted(set((looking // self.geometry.block_length).tolist())):
            pages_GP = found.kv.mask(index, -(-step.group.prefix_lens[index] // self.geometry.page_size))
            per_page = self.geometry.page_size // self._granule(step)
            granules = -(-step.group.prefix_lens[index] // self._granule(step))
            self._support.extend(layer, step.slots[index], pages_GP.repeat_interleave(per_page, 1)[:, :granules])
        return found.scored

    def _with_remainder(
        self, layer: int, q_RHD: Tensor, plan: PrefixPlan, got: AttnState, step: DenoiseStep, scale: float
    ) -> AttnState:
        """Merge what was read of the supports with the remainders; rows that read everything stay as they are."""
        planned = plan.known_rows
        assert planned is not None and plan.kv is not None
        sparse_S = ~step.tensor(plan.kv.whole, torch.bool)
        mine = sparse_S[planned // self.geometry.block_length].nonzero().flatten()
        if not mine.shape[0]:
            return got
        rows = planned[mine]
        place = step.place_R[rows]
        out, lse_at_zero = self._remainder.read(layer, place)
        mean_key_RHD = self._mean_key.of_layer(layer, q_RHD).flatten(0, 1)[place]
        lse = lse_at_zero + scale * (q_RHD[rows].float() * mean_key_RHD.float()).sum(-1)
        merged = merge_states(got.out_RHD[mine], got.lse_RH[mine], out, lse)
        return AttnState(*(every.index_copy(0, mine, some) for every, some in zip(got, merged, strict=True)))

    # -- the first step ---------------------------------------------------------------------------------------------

    def _room_for_peaks(self, q_RHD: Tensor, rows: Tensor | None, step: DenoiseStep) -> Tensor | None:
        """Where the dense first step writes page peaks, if a block opens whose prefix exceeds its budget."""
        if not any(_selecting(step)):
            return None
        pages = -(-max(step.group.prefix_lens) // self.geometry.page_size)
        count = q_RHD.shape[0] if rows is None else rows.shape[0]
        return torch.empty(count, q_RHD.shape[1], pages, device=q_RHD.device)

    def _open(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: AttnState,
        part: Part,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> None:
        """Choose the supports of the opening blocks, all of whose rows are planned, and remember what lies outside."""
        planned = plan.known_rows
        assert plan.peaks is not None
        at = part.rows if planned is None else torch.searchsorted(planned, part.rows)
        q, peaks, lse = q_RHD[part.rows], plan.peaks[at], got.lse_RH[at]
        mean_keys = []
        for index, number in enumerate(part.segments):
            mine = slice(index * self.geometry.block_length, (index + 1) * self.geometry.block_length)
            mean_keys.append(self._choose(layer, q[mine], peaks[mine], lse[mine], number, step, backend))
        if not _options(step).remainder:
            return
        others = tuple(not mine for mine in _selecting(step))
        support = PrefixPlan(part.rows, self._support.lists(layer, step.slots, others), self._granule(step))
        step.meter.also(support, backend.pool)
        over_support = backend.settle(backend.prefix(layer, q_RHD, support, step.group))
        out, lse_rest = remove_state(got.out_RHD[at], lse, *over_support)
        mean_key_RHD, place = torch.cat(mean_keys), step.place_R[part.rows]
        kept_RHD = self._mean_key.of_layer(layer, q_RHD).flatten(0, 1)
        kept_RHD[place] = mean_key_RHD.to(kept_RHD.dtype)
        slope = backend.scale * (q.float() * kept_RHD[place].float()).sum(-1)
        self._remainder.write(layer, place, AttnState(out, lse_rest - slope))

    def _choose(
        self,
        layer: int,
        q_RHD: Tensor,
        peaks_RHP: Tensor,
        lse_RH: Tensor,
        number: int,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> Tensor:
        """Hold the support of one opening block and return the mean keys of what else weighs most: [B, H, D]."""
        options, segment, page_size = _options(step), step.group.segments[number], self.geometry.page_size
        count, pages = step.budgets[number] // self._granule(step), -(-segment.prefix_len // page_size)
        scores_GP = page_scores(peaks_RHP[..., :pages], lse_RH, self.geometry.num_kv_heads)
        wanted = min(step.budgets[number], max(LEAST_PAGES, options.spread * step.budgets[number] // page_size))
        near = candidates(layer, q_RHD, lse_RH, best_granules(scores_GP, wanted), segment, backend)
        step.meter.vectors(number, near.positions_GN.shape[1])
        if options.granule == "token":
            taken_GN = best_granules(near.scores_GXN.amax(1), count, options.least_mass)
            self._support.put(layer, step.slots[number], taken_GN, near.positions_GN)
        else:
            chosen_GP = best_granules(scores_GP, count, options.least_mass)
            taken_GN = chosen_GP.gather(1, near.positions_GN // page_size)
            self._support.put(layer, step.slots[number], chosen_GP)
        return near.mean_keys(taken_GN, q_RHD.shape[0])


def _options(step: DenoiseStep) -> LosaPlusOptions:
    assert isinstance(step.options, LosaPlusOptions)
    return step.options


def _selecting(step: DenoiseStep) -> tuple[bool, ...]:
    """Segments that choose a support in this step: their block opens and their prefix exceeds the budget."""
    return tuple(first and not covered for first, covered in zip(step.opens, step.whole, strict=True))


def _distance(now: Tensor, before: Tensor) -> Tensor:
    """Length of each row's change relative to its earlier query, over all heads and channels: float32, [..., H, D]."""
    before = before.float()
    change, length = ((now.float() - before).square().sum((-1, -2)), before.square().sum((-1, -2)))
    return (change / length.clamp(min=1e-30)).sqrt()
