"""Attention by FlashInfer's FA2 kernels: dense over spans of pages, and sparse over lists that only the device knows.

Its plans are made on the host. A dense plan is made anew for each forward from lengths that the host knows, and may
split long spans. A listed plan is made once for all lists of a kind: it only fixes how many entries there are and how
many query slots each has, and without split-KV the kernels take everything else from the device; we do the splitting.
Base-2 log-sum-exps and the finite number that stands for an empty one stay in here: natural ones go out.

backend="fa2" always: on Hopper "auto" takes FA3, whose tiles of 128 rows do not fold the heads of a group.
R rows, S segments, B block length, H query heads, G KV heads, E list heads, D head dim.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losa_kernels.triton.entries import Entries, fill_entries, merge_entries
from losa_kernels.triton.fold import fold_queries
from losa_kernels.triton.launch import power_of_two
from losa_kernels.triton.layout import Lists, Pages, Planned, Segments

EMPTY = -4.0e4  # base-2 log-sum-exps down to here belong to spans without keys (the package says -5e4)
LN2 = math.log(2.0)
PROGRAMS_PER_PROCESSOR = 2
SPLIT_KEYS = 256  # a split of a list is worth its launch from about here
TILE_ROWS = 128  # the largest tile of the package, for the size of its workspace
LEAST_WORKSPACE = 128 << 20
PLAN_BYTES = 1 << 20  # least room for the tables of a listed plan: 12 bytes per program, 4 per entry
# Not before a kernel that starts early has waited for the one before it may it read what that one wrote; the package's
# kernels read the lengths of their lists sooner.
EARLY_START = False


class Span(NamedTuple):
    """Some rows and the keys all of them see: the first `tokens` of these pages (int64 ids, on the device)."""

    rows: int
    pages: Tensor
    tokens: int


class DensePlan:
    """Spans of consecutive rows. Its tables live as long as it does; made and used on one stream."""

    def __init__(self, wrapper: Any, rows: int) -> None:
        self.wrapper, self.rows = wrapper, rows


@dataclass(frozen=True, eq=False)
class _ListedPlan:
    """room: segments; slots: rows of each. The entries are written anew for each call."""

    wrapper: Any
    entries: Entries
    room: int
    slots: int
    splits: int


class FlashInferAttention:
    """Attention of one page pool. Calls come from one thread, and what they launch runs on one stream.

    wrapper: the package's class. processors: of the device.
    """

    def __init__(
        self,
        wrapper: Any,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        processors: int,
    ) -> None:
        self._wrapper, self._processors = wrapper, processors
        self._heads, self._kv_heads, self._dim, self._page_size = num_heads, kv_heads, head_dim, page_size
        self._scale, self._dtype, self._device = scale, dtype, device
        size = workspace_bytes(num_heads, kv_heads, head_dim, processors)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._free: list[Any] = []  # wrappers of dense plans that are no more
        self._listed: dict[tuple[int, ...], _ListedPlan] = {}

    # -- dense ------------------------------------------------------------------------------------------------------

    def plan(self, spans: Sequence[Span]) -> DensePlan:
        """A plan for these spans, whose rows follow one another. Costs some 20 microseconds per span on the host."""
        page = self._page_size
        counts = [-(-span.tokens // page) for span in spans]
        held = [span.pages[:count] for span, count in zip(spans, counts, strict=True)]
        last = [span.tokens - max(0, count - 1) * page for span, count in zip(spans, counts, strict=True)]
        wrapper = self._free.pop() if self._free else self._make()
        rows = [span.rows for span in spans]
        wrapper.plan(
            _ends(rows),
            _ends(counts),
            torch.cat(held).to(torch.int32),
            torch.tensor(last, dtype=torch.int32),
            max_token_per_sequence=max(rows),
            **self._about(self._heads, self._kv_heads, page),
        )
        plan = DensePlan(wrapper, sum(rows))
        weakref.finalize(plan, self._free.append, wrapper)
        return plan

    def dense(self, plan: DensePlan, q_RHD: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
        """Attention of each row to its span: float32 out [R, H, D] and natural lse [R, H]; without keys 0 and -inf."""
        assert q_RHD.shape[0] == plan.rows
        out = torch.empty_like(q_RHD)
        lse = torch.empty(q_RHD.shape[:2], dtype=torch.float32, device=q_RHD.device)
        self._run(plan.wrapper, q_RHD, (pages.k, pages.v), out, lse)
        return out.float(), torch.where(lse > EMPTY, lse * LN2, -torch.inf)

    # -- listed -----------------------------------------------------------------------------------------------------

    def can_list(self, lists: Lists) -> bool:
        """Whether `listed` takes such lists: one per segment and head, of whole pages or equal parts of pages."""
        return not lists.per_row and self._page_size % lists.granule == 0

    def listed(
        self, q_RHD: Tensor, planned: Planned, pages: Pages, segments: Segments, lists: Lists | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of the planned rows to what `lists` name (None: their whole prefixes), a list for each head.

        float32 out [n, H, D] and natural lse [n, H]. Nothing here waits for the device once a plan of the kind exists.
        """
        list_heads, granule = (self._kv_heads, self._page_size) if lists is None else (lists.heads, lists.granule)
        most = segments.longest if lists is None else lists.most
        slots = power_of_two(max(planned.most or (segments.block_length,)))
        plan = self._listed_plan(segments.count, slots, list_heads, granule, most)
        share = self._heads // list_heads
        fill_entries(plan.entries, pages, segments, plan.splits, lists)
        folded = fold_queries(q_RHD, planned, list_heads, plan.slots, plan.splits, plan.room)
        out = torch.empty_like(folded)
        lse = torch.empty(folded.shape[:-1], dtype=torch.float32, device=folded.device)
        k, v = (x.view(-1, 1, granule, self._dim) for x in (pages.k, pages.v))
        flat = (-1, share, self._dim)
        self._run(plan.wrapper, folded.view(flat), (k, v), out.view(flat), lse.view(-1, share))
        return merge_entries(out, lse, planned, segments.block_length)

    def _listed_plan(self, segments: int, slots: int, list_heads: int, granule: int, most: int) -> _ListedPlan:
        """The plan for lists of this kind. Rounded up, so that there are few of them; none is ever dropped, since a
        captured graph may hold its tables."""
        key = (power_of_two(segments), slots, list_heads, granule, power_of_two(-(-most // granule)))
        found = self._listed.get(key)
        if found is None:
            found = self._listed[key] = self._new_listed_plan(*key)
        return found

    def _new_listed_plan(self, room: int, slots: int, list_heads: int, granule: int, granules: int) -> _ListedPlan:
        lists, share = room * list_heads, self._heads // list_heads
        wanted = -(-PROGRAMS_PER_PROCESSOR * self._processors // lists)
        splits = max(1, min(wanted, granules * granule // SPLIT_KEYS))
        count = lists * splits
        entries = Entries(
            torch.zeros(count + 1, dtype=torch.int32, device=self._device),
            torch.zeros(lists * granules, dtype=torch.int32, device=self._device),
            torch.zeros(count, dtype=torch.int32, device=self._device),
        )
        wrapper = self._make()
        programs = count * -(-slots * share // 16)
        size = max(PLAN_BYTES, 16 * (programs + count))
        wrapper.reset_workspace_buffer(self._workspace, torch.empty(size, dtype=torch.uint8, device=self._device))
        # What lies on the device is taken as it is, not copied: the kernels will read what `fill_entries` writes.
        wrapper.plan(
            _ends([slots] * count),
            entries.indptr,
            entries.pages,
            entries.last,
            max_token_per_sequence=slots,
            disable_split_kv=True,
            **self._about(share, 1, granule),
        )
        return _ListedPlan(wrapper, entries, room, slots, splits)

    # -- both -------------------------------------------------------------------------------------------------------

    def _make(self) -> Any:
        return self._wrapper(self._workspace, kv_layout="HND", backend="fa2")

    def _run(self, wrapper: Any, q: Tensor, cache: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
        wrapper.run(q, cache, out=out, lse=lse, return_lse=True, enable_pdl=EARLY_START)

    def _about(self, heads: int, kv_heads: int, page_size: int) -> dict[str, Any]:
        return {
            "num_qo_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim_qk": self._dim,
            "page_size": page_size,
            "causal": False,
            "sm_scale": self._scale,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype,
        }


def workspace_bytes(num_heads: int, kv_heads: int, head_dim: int, processors: int) -> int:
    """Memory in which the package keeps the parts of split spans: at most two programs per processor and KV head."""
    parts = PROGRAMS_PER_PROCESSOR * processors // kv_heads + 1
    return max(LEAST_WORKSPACE, num_heads * parts * TILE_ROWS * (head_dim + 1) * 4)


def _ends(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
