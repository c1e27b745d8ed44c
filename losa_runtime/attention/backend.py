"""How attention is computed: what a backend is asked, what it answers, and the table of backends.

A backend sees groups of segments and page lists. It does not know why a list was chosen, nor any request.
T rows of the batch, R rows of a group, S segments, B block length, H query heads, G KV heads, D head dim, P pages.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.reference import paging, selection
from losa_kernels.triton.layout import Planned
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.cache.transfer import queued
from losa_runtime.core.batch import Segment
from losa_runtime.core.errors import ConfigError

logger = logging.getLogger(__name__)

BACKENDS: dict[str, str] = {
    "native": "losa_runtime.attention.native_backend:NativeBackend",
    "triton": "losa_runtime.attention.triton_backend:TritonBackend",
    "flashinfer": "losa_runtime.attention.flashinfer_backend:FlashInferBackend",
    "torch": "losa_runtime.attention.torch_backend:TorchBackend",
}
AUTO = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}  # the first that can serve the model


Rows: TypeAlias = Tensor | Planned
"""Planned rows of a group: int64, sorted; or, where only the device knows how many they are, in room for more. A method
hands on what a backend's `changed_rows` gave it, as it is."""


class AttnState(NamedTuple):
    """Attention over some keys: out normalised, lse natural and float32. No keys: out 0, lse -inf."""

    out_RHD: Tensor
    lse_RH: Tensor


class AttnParts(NamedTuple):
    """Attention of planned rows, cut along the keys, until its backend settles it: float32 [C, n, H, D] and [C, n, H].

    A part without keys has lse -inf and an undefined out. What lies behind the last row is undefined.
    """

    out_CnHD: Tensor
    lse_CnH: Tensor
    rows: Planned


PrefixState: TypeAlias = AttnState | AttnParts  # what a backend answers; `settle` makes a state of either


class RenewedStates(NamedTuple):
    """Attention of R rows to their prefixes: fresh for the planned rows, remembered from an earlier step for the rest.

    A fresh state also replaces the remembered one, but only when a backend is given this: whoever makes one hands it
    on, once, and reads the memory not before.
    kept: the memory, out [Y, H, D] and lse [Y, H] float32, written to. place_R: int64, each row's place in it, no two
    the same. rows: the planned rows as in the plan (None = all). fresh: their states, in order. heads_nH: bool, the
    heads of each planned row whose fresh state counts; the others keep the remembered one. None = all.
    """

    kept: AttnState
    place_R: Tensor
    rows: Rows | None
    fresh: PrefixState
    heads_nH: Tensor | None = None


class ScoreKind(Enum):
    """What a score says of a granule of the prefix."""

    BOUND = "bound"  # an upper bound of q . k over its keys, from Summary.KEY_BOUNDS


class KVIndices(NamedTuple):
    """Which granules of the prefix are read, as lists in CSR form.

    indptr: int64 [E + 1]; list e is indices[indptr[e] : indptr[e + 1]]: granule numbers inside the request's prefix,
    sorted and unique. The lists are ordered by owner, then head. An owner is a segment of the group, or with `per_row`
    a row of the plan; heads is G (one list per KV head, shared by its query heads) or H.
    whole: per segment, True = read the whole prefix instead; its lists are empty.
    most: bound on the granules of any list, where the host has one. Lists made on the device lie in room for more: then
    `indices` is longer than the lists, and with `per_row` there are empty lists behind those of the last planned row.
    """

    indptr: Tensor
    indices: Tensor
    heads: int
    whole: tuple[bool, ...]
    per_row: bool = False
    most: int | None = None

    def mask(self, owner: int, width: int) -> Tensor:
        """The lists of one owner as a bool mask [heads, width]."""
        ends = self.indptr[owner * self.heads : (owner + 1) * self.heads + 1]
        head = torch.repeat_interleave(torch.arange(self.heads, device=ends.device), ends.diff())
        marked = torch.zeros(self.heads, width, dtype=torch.bool, device=ends.device)
        marked[head, self.indices[int(ends[0]) : int(ends[-1])]] = True
        return marked

    @classmethod
    def from_mask(cls, chosen_OEP: Tensor, whole: tuple[bool, ...], per_row: bool = False) -> KVIndices:
        """Lists per owner and head from a bool mask; the mask of whole segments is empty."""
        ends = chosen_OEP.sum(-1).flatten().cumsum(0)
        indptr = torch.cat((ends.new_zeros(1), ends))
        return cls(indptr, chosen_OEP.nonzero()[:, -1], chosen_OEP.shape[1], whole, per_row)


class PrefixPlan(NamedTuple):
    """The question a sparse method puts to a backend.

    rows: rows of the group whose prefix attention is computed; None = all, empty = none.
    kv: what they read; None = the whole prefix. granule: tokens per index of `kv`.
    scored: per segment, True where choosing `kv` read the page summaries, if any of its rows is planned (None =
    nowhere). For the record only.
    peaks: an output, float32 [planned rows, H, P]: where a row reads its whole prefix, the backend writes the row's
    largest scaled score q . k in each page; every other entry becomes -inf. None = not wanted.
    """

    rows: Rows | None = None
    kv: KVIndices | None = None
    granule: int = 1
    scored: tuple[bool, ...] | None = None
    peaks: Tensor | None = None

    @property
    def known_rows(self) -> Tensor | None:
        """The rows, for a backend that plans no others than those whose number the host knows."""
        return known(self.rows)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Segments whose rows are computed together. Tensors given beside a group hold its rows and no others, in order.

    where: the place of the rows in the batch. counts: rows per segment (B for a block segment).
    """

    segments: tuple[Segment, ...]
    where: slice | Tensor
    counts: tuple[int, ...]
    block_length: int

    @classmethod
    def of(cls, segments: Sequence[Segment], block_length: int, device: torch.device) -> RowGroup:
        """The group of these segments; neighbours in the batch are taken by a view instead of a copy."""
        counts = tuple(segment.stop - segment.start for segment in segments)
        assert segments and all(count > 0 and count % block_length == 0 for count in counts)
        where: slice | Tensor
        if all(left.stop == right.start for left, right in pairwise(segments)):
            where = slice(segments[0].start, segments[-1].stop)
        else:
            spans = [torch.arange(segment.start, segment.stop) for segment in segments]
            where = queued(torch.cat(spans), device)
        return cls(tuple(segments), where, counts, block_length)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment inside the group."""
        return (0, *accumulate(self.counts[:-1]))

    @property
    def prefix_lens(self) -> tuple[int, ...]:
        """Committed tokens before each segment."""
        return tuple(segment.prefix_len for segment in self.segments)

    @property
    def padding(self) -> bool:
        """Whether no segment has anything to unmask: what a recording is made on, with bounds in place of lengths."""
        return all(segment.masked == () for segment in self.segments)

    def take(self, x_T: Tensor) -> Tensor:
        """The group's rows of a tensor over the batch."""
        return x_T[self.where]

    def put(self, into_T: Tensor, x_R: Tensor) -> None:
        """Write the group's rows into a tensor over the batch, rounding to its dtype."""
        into_T[self.where] = x_R.to(into_T.dtype)


class PageChoice(NamedTuple):
    """How the rows of a segment choose pages.

    share: "max", "mean" = one list per KV head, by the largest or the mean score of its query heads; "none" = a list
    per query head. per_row: each row keeps its own list; otherwise all rows of a segment share the union of theirs.
    """

    share: selection.Share = "max"
    per_row: bool = False


class PerSegment(NamedTuple):
    """A number per segment: int64 on the device, and on the host, which needs it for bounds."""

    device_S: Tensor
    host: tuple[int, ...]


class ActiveRules(NamedTuple):
    """Which rows of each segment are recomputed: by the rules of `reference.selection.active_rows`, or all.

    count_S: int64; tau_S: float32. fresh: segments all of whose rows are. most: bound on the rows of each segment.
    keep_stable: a row that is not recomputed keeps the query with which it is compared the next time.
    """

    count_S: Tensor
    tau_S: Tensor
    fresh: tuple[bool, ...]
    most: tuple[int, ...]
    keep_stable: bool = False


class SelectedPages(NamedTuple):
    """Pages to read, and `scored` as in PrefixPlan."""

    kv: KVIndices
    scored: tuple[bool, ...]


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
    """

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


def known(rows: Rows | None) -> Tensor | None:
    """Rows whose number the host knows: those of a backend that plans no others, or that a method listed itself."""
    assert not isinstance(rows, Planned), "rows that only the device can count are for the backend that planned them"
    return rows


def backend_class(name: str) -> type[AttentionBackend]:
    """The backend of that name. Raises ConfigError."""
    if name not in BACKENDS:
        raise ConfigError(f"attention_backend: found {name!r}, allowed: {', '.join(BACKENDS)}")
    module, _, member = BACKENDS[name].partition(":")
    found = getattr(importlib.import_module(module), member)
    assert issubclass(found, AttentionBackend)
    return found


def own_bytes(name: str, config: BackendConfig) -> int:
    """Memory that the backend called `name` will take for good, beside the pages. Raises ConfigError."""
    if name == "auto" or _refusal(name, config) is not None:
        return 0
    return backend_class(name).own_bytes(config)


def make_backend(name: str, config: BackendConfig, pool: KVPool, scale: float | None = None) -> AttentionBackend:
    """Build the backend called `name`; "auto" is the first of AUTO that can serve `config`, with a line in the log.

    Raises ConfigError with the reasons if none can.
    """
    refused: list[str] = []
    for candidate in AUTO.get(config.device.type, ("torch",)) if name == "auto" else (name,):
        reason = _refusal(candidate, config)
        if reason is None:
            cls = backend_class(candidate)
            backend = cls(pool, config.num_heads, scale, config.same_bits, config.context_length)
            if name == "auto":
                detail = "; ".join(filter(None, (backend.detail, *refused)))
                logger.info("attention_backend auto: %s%s", candidate, f" ({detail})" if detail else "")
            return backend
        refused.append(f"{candidate!r} cannot serve this model: {reason}")
    raise ConfigError(f"attention_backend: {'; '.join(refused)}")


def _refusal(name: str, config: BackendConfig) -> str | None:
    """None, or why the backend called `name` cannot serve `config`. Raises ConfigError if there is none."""
    try:
        return backend_class(name).supports(config)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in ("", "losa_runtime", "losa_kernels"):
            raise
        return f"the package {package!r} is not installed"
