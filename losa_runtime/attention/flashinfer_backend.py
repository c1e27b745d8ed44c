"""The GPU backend with FlashInfer's kernels for whatever reads prefixes; all else is Triton's.

Chosen by `attention_backend: flashinfer`; Triton's own is the default until this one has passed on a device. FlashInfer
reads: prompts and finished blocks, whole prefixes, and lists of pages or of equal parts of pages, one per segment and
head. What it has no layout for (lists per row, granules larger than a page, parts of pages for some segments beside
whole prefixes of others) and what has to come with page peaks is read by Triton's kernels as ever.
R rows, n planned rows, S segments, B block length, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from losa_kernels.triton.merge import merge_states
from losa_runtime.attention.backend import BackendConfig
from losa_runtime.attention.device_backend import DeviceBackend, processors_of
from losa_runtime.attention.flashinfer_attention import DensePlan, FlashInferAttention, Span, workspace_bytes
from losa_runtime.attention.flashinfer_interface import load_wrapper
from losa_runtime.attention.questions import AttnState, PrefixPlan, PrefixState, RowGroup
from losa_runtime.cache.kv_pool import KVPool
from losa_runtime.cache.transfer import queued
from losa_runtime.core.errors import ConfigError

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
PLANS_BYTES = 256 << 20


class _StoredPlan(NamedTuple):
    """Of store segments. before: every row and what lies before its segment, or, of a segment that is one block, all
    that it sees. within: the rows of longer segments, at `rows` (None = all), and what they see of their own segment,
    block by block.
    """

    before: DensePlan
    within: DensePlan | None
    rows: Tensor | None


class FlashInferBackend(DeviceBackend):
    """See `DeviceBackend` and the module. Raises ConfigError if the package does not fit."""

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        scale: float | None = None,
        same_bits: bool = False,
        context_length: int | None = None,
    ) -> None:
        super().__init__(pool, num_heads, scale, same_bits, context_length)
        sizes = (num_heads, pool.num_kv_heads, pool.head_dim, pool.page_size)
        about = (self.scale, pool.dtype, pool.device, self._processors)
        self._flashinfer = FlashInferAttention(load_wrapper(), *sizes, *about)
        # Of the running forward.
        self._stored_plans: WeakKeyDictionary[RowGroup, _StoredPlan] = WeakKeyDictionary()
        self._whole_plans: WeakKeyDictionary[RowGroup, DensePlan] = WeakKeyDictionary()

    @classmethod
    def supports(cls, config: BackendConfig) -> str | None:
        if config.dtype not in DTYPES or config.kv_dtype != config.dtype:
            return f"queries of {config.dtype} and pages of {config.kv_dtype}, allowed: both bfloat16 or both float16"
        if config.head_dim not in HEAD_DIMS:
            return f"head dim {config.head_dim}, allowed: {', '.join(map(str, HEAD_DIMS))}"
        if config.same_bits:
            return "its tiles depend on the batch; deterministic results need another backend"
        try:
            load_wrapper()
        except ConfigError as unfit:
            return str(unfit)
        return super().supports(config)

    @classmethod
    def own_bytes(cls, config: BackendConfig) -> int:
        """For the package's workspace, and for its plans, of which there are some tens."""
        processors = processors_of(config.device)
        workspace = workspace_bytes(config.num_heads, config.num_kv_heads, config.head_dim, processors)
        return workspace + PLANS_BYTES

    def prepare(self, group: RowGroup) -> None:
        if group.segments[0].mode.stores:
            self._stored_plan(group)
        else:
            super().prepare(group)

    def prefill(self, layer: int, q_RHD: Tensor, group: RowGroup) -> Tensor:
        plan, pages, q_RHD = self._stored_plan(group), self._layers[layer], q_RHD.contiguous()
        out, lse = self._flashinfer.dense(plan.before, q_RHD, pages)
        if plan.within is None:
            return out
        if plan.rows is None:
            return merge_states(out, lse, *self._flashinfer.dense(plan.within, q_RHD, pages))[0]
        own = self._flashinfer.dense(plan.within, q_RHD[plan.rows], pages)
        out[plan.rows] = merge_states(out[plan.rows], lse[plan.rows], *own)[0]
        return out

    def prefix(self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        if plan.peaks is not None:
            return super().prefix(layer, q_RHD, plan, group)
        q_RHD, pages, whole = q_RHD.contiguous(), self._layers[layer], plan.kv is None or all(plan.kv.whole)
        if whole and plan.rows is None and not group.padding:
            return AttnState(*self._flashinfer.dense(self._whole_plan(group), q_RHD, pages))
        device_group = self._group(group)
        lists = None if whole else self._lists(plan, group, device_group)
        # In lists of parts of pages a whole prefix would have to be spelled out.
        apart = lists is not None and lists.granule < self.pool.page_size and plan.kv is not None and any(plan.kv.whole)
        if lists is not None and (apart or not self._flashinfer.can_list(lists)):
            return super().prefix(layer, q_RHD, plan, group)
        where = (device_group.planned(plan.rows), pages, device_group.segments, lists)
        return AttnState(*self._flashinfer.listed(q_RHD, *where))

    def _whole_plan(self, group: RowGroup) -> DensePlan:
        found = self._whole_plans.get(group)
        if found is None:
            rows = group.block_length
            spans = [Span(rows, segment.pages, segment.prefix_len) for segment in group.segments]
            found = self._whole_plans[group] = self._flashinfer.plan(spans)
        return found

    def _stored_plan(self, group: RowGroup) -> _StoredPlan:
        found = self._stored_plans.get(group)
        if found is None:
            found = self._stored_plans[group] = self._plan_stored(group)
        return found

    def _plan_stored(self, group: RowGroup) -> _StoredPlan:
        page, block = self.pool.page_size, group.block_length
        before, within, rows = list[Span](), list[Span](), list[Tensor]()
        for segment, start, count in zip(group.segments, group.starts, group.counts, strict=True):
            if count == block:
                before.append(Span(count, segment.pages, segment.prefix_len + count))
                continue
            # What the segment shares with a page before it is read with the segment.
            shared = segment.prefix_len // page * page
            before.append(Span(count, segment.pages, shared))
            own, ends = segment.pages[shared // page :], range(block, count + block, block)
            within.extend(Span(block, own, segment.prefix_len - shared + end) for end in ends)
            rows.append(torch.arange(start, start + count))
        plan = self._flashinfer.plan(before)
        if not within:
            return _StoredPlan(plan, None, None)
        place = None if len(rows) == len(group.segments) else queued(torch.cat(rows), self.pool.device)
        return _StoredPlan(plan, self._flashinfer.plan(within), place)
