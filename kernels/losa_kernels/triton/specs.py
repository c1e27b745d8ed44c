"""Which kernels are compiled ahead, at the sizes of TraDo-8B, and what each may use of a processor.

A spec calls the very function that the runtime calls, on tensors without memory, and takes what that would launch: so
what is compiled is what will run. Sizes: 32 query heads, 8 KV heads, head dim 128, bfloat16, pages of 16 tokens, blocks
of 16 or 32 rows, 32K tokens of context. Experts as in LLaDA2-mini: 256 of width 512 on 2048 channels, 8 per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.triton import (
    active,
    block,
    change,
    choose,
    entries,
    experts,
    fold,
    mass,
    merge,
    prefill,
    prefix,
    scores,
    store,
    unite,
)
from losa_kernels.triton.launch import Launch, noted_launches
from losa_kernels.triton.layout import Lists, Pages, Parts, Planned, Segments

HEADS, KV_HEADS, DIM, PAGE, CONTEXT = 32, 8, 128, 16, 32768
SEGMENTS, POOL, SLOTS, BUDGET = 8, 4096, 16, 1024
ARCHS = (80, 86, 89, 90, 100)
SCALE = DIM**-0.5


class Spec(NamedTuple):
    """One kernel at one size. call: makes its launch. registers: most per thread. shared: most bytes per program."""

    kernel: str
    call: Callable[[], object]
    registers: int = 128
    shared: int = 16 * 1024

    def launch(self) -> Launch:
        """The launch of `kernel` that the call would make."""
        with noted_launches() as launches:
            self.call()
        [found] = [launch for launch in launches if launch.kernel.__name__ == self.kernel]
        return found


def floats(*shape: int) -> Tensor:
    """bfloat16 without memory."""
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def singles(*shape: int) -> Tensor:
    """float32 without memory."""
    return torch.empty(*shape, dtype=torch.float32, device="meta")


def integers(*shape: int) -> Tensor:
    """int64 without memory."""
    return torch.empty(*shape, dtype=torch.int64, device="meta")


def flags(*shape: int) -> Tensor:
    """bool without memory."""
    return torch.empty(*shape, dtype=torch.bool, device="meta")


def pages(moments: bool = False) -> Pages:
    """A layer of the pool, with bounds."""
    shape, summary = (POOL, KV_HEADS, PAGE, DIM), (POOL, KV_HEADS, 2, DIM)
    return Pages(floats(*shape), floats(*shape), floats(*summary), singles(*summary) if moments else None)


def segments(length: int) -> Segments:
    """A batch with this block length."""
    return Segments(integers(SEGMENTS + 1), integers(POOL), integers(SEGMENTS), length, CONTEXT)


def queries(length: int) -> Tensor:
    """The queries of the batch."""
    return floats(SEGMENTS * length, HEADS, DIM)


def planned(length: int) -> Planned:
    """Planned rows of the batch."""
    rows = SEGMENTS * length
    return Planned(integers(rows), integers(SEGMENTS + 1), integers(rows))


def parts(length: int) -> Parts:
    """Parts of two splits."""
    rows = SEGMENTS * length
    return Parts(singles(2, rows, HEADS, DIM), singles(2, rows, HEADS))


def _prefix(length: int, granule: int | None = None, peaks: bool = False, per_row: bool = False) -> object:
    lists = None
    heads = HEADS if per_row else KV_HEADS
    if granule is not None:
        owners = SEGMENTS * (length if per_row else 1)
        some = (integers(owners * heads + 1), integers(POOL))
        lists = Lists(*some, heads, granule, flags(SEGMENTS), BUDGET, per_row)
    wanted = singles(SEGMENTS * length, HEADS, CONTEXT // PAGE) if peaks else None
    where = (planned(length), pages(), segments(length), SCALE, lists)
    return prefix.attend_prefix(queries(length), *where, peaks=wanted)


def _prefill(length: int, size: int) -> object:
    tiles = prefill.Tiles(integers(64, 5), integers(POOL), size, CONTEXT)
    return prefill.attend_stored(queries(length), tiles, pages(), SCALE, length)


def _finish(length: int, kept: bool = True) -> object:
    rows, places = SEGMENTS * length, SLOTS * length
    memory = block.Kept(singles(places, HEADS, DIM), singles(places, HEADS), integers(rows)) if kept else None
    fresh = block.Fresh(parts(length), planned(length))
    own = (floats(rows, KV_HEADS, DIM), floats(rows, KV_HEADS, DIM))
    return block.finish_block(queries(length), *own, length, SCALE, memory, fresh)


def _change(length: int) -> object:
    return change.query_change(queries(length), *_remembered(length), flags(SEGMENTS))


def _keep(length: int) -> None:
    change.keep_changed(queries(length), *_remembered(length), flags(SEGMENTS * length, 1))


def _remembered(length: int) -> tuple[Tensor, Tensor]:
    return floats(SLOTS, length, HEADS, DIM), integers(SEGMENTS)


def _active(length: int) -> object:
    return active.active_rows(singles(SEGMENTS, 1, length), integers(SEGMENTS), singles(SEGMENTS), flags(SEGMENTS))


def _select(length: int) -> object:
    rows, where, skipped = planned(length), segments(length), flags(SEGMENTS)
    found = scores.page_scores(queries(length), rows, pages(), where, skipped)
    bars = choose.page_bars(found, rows, where, PAGE, integers(SEGMENTS), skipped, CONTEXT // PAGE)
    return unite.page_lists(found, bars, rows, where, PAGE, skipped, POOL, CONTEXT)


def _store(moments: bool = False) -> None:
    rows = floats(64, KV_HEADS, DIM)
    filled = torch.empty(POOL, dtype=torch.int32, device="meta")
    store.store_rows(pages(moments), rows, rows, integers(64), filled)


def _merge() -> object:
    states = (singles(64, HEADS, DIM), singles(64, HEADS))
    return merge.merge_states(*states, *states)


def _entries() -> None:
    room = SEGMENTS * KV_HEADS * 2
    into = entries.Entries(*(torch.empty(n, dtype=torch.int32, device="meta") for n in (room + 1, POOL, room)))
    lists = Lists(integers(SEGMENTS * KV_HEADS + 1), integers(POOL), KV_HEADS, PAGE, flags(SEGMENTS), BUDGET)
    entries.fill_entries(into, pages(), segments(16), 2, lists)


def _merge_entries() -> object:
    shape = (SEGMENTS, KV_HEADS, 2, 16, HEADS // KV_HEADS)
    return entries.merge_entries(floats(*shape, DIM), singles(*shape), planned(16), 16)


def _experts(tokens: int) -> object:
    choice = (integers(tokens, 8), singles(tokens, 8))
    return experts.mix_experts(floats(tokens, 2048), *choice, floats(256, 1024, 2048), floats(256, 2048, 512))


def _mass() -> object:
    return mass.prefix_mass(queries(16), singles(SEGMENTS * 16, HEADS), pages(), segments(16), SCALE)


# Budgets: what the kernels use and a little room. Two programs of 128 threads with at most 255 registers and 50 KB of
# shared memory fit on every one of these processors.
SPECS: dict[str, Spec] = {
    "prefix_whole_block_32": Spec("_prefix_kernel", lambda: _prefix(32), 208, 72 * 1024),
    "prefix_peaks_block_16": Spec("_prefix_kernel", lambda: _prefix(16, peaks=True), 240, 50 * 1024),
    "prefix_pages_block_16": Spec("_prefix_kernel", lambda: _prefix(16, PAGE), 192, 50 * 1024),
    "prefix_tokens_block_16": Spec("_prefix_kernel", lambda: _prefix(16, 1), 192, 50 * 1024),
    "prefix_own_lists": Spec("_prefix_kernel", lambda: _prefix(16, PAGE, per_row=True), 128, 32 * 1024),
    "prefill_chunk": Spec("_prefill_kernel", lambda: _prefill(16, 128), 240, 100 * 1024),
    "prefill_block_16": Spec("_prefill_kernel", lambda: _prefill(16, 64), 192, 84 * 1024),
    "merge_parts": Spec("_merge_parts_kernel", lambda: merge.merge_parts(parts(16), planned(16)), 64),
    "merge_all_parts": Spec("_merge_parts_kernel", lambda: merge.merge_parts(parts(16)), 64),
    "merge_states": Spec("_merge_states_kernel", _merge, 64),
    "finish_block_16": Spec("_block_kernel", lambda: _finish(16), 168, 32 * 1024),
    "finish_block_forgotten": Spec("_block_kernel", lambda: _finish(16, kept=False), 168, 32 * 1024),
    "finish_block_32": Spec("_block_kernel", lambda: _finish(32), 168, 32 * 1024),
    "query_change": Spec("_change_kernel", lambda: _change(16), 64),
    "keep_changed": Spec("_keep_kernel", lambda: _keep(16), 64),
    "active_rows": Spec("_active_kernel", lambda: _active(32), 96),
    "plan_rows": Spec("_plan_kernel", lambda: active.plan_rows(flags(SEGMENTS * 16, 1), 16), 64),
    "page_scores": Spec("_scores_kernel", lambda: _select(16), 168, 50 * 1024),
    "page_bars": Spec("_bars_kernel", lambda: _select(16), 80),
    "mark_pages": Spec("_mark_kernel", lambda: _select(16), 96),
    "list_pages": Spec("_list_kernel", lambda: _select(16), 64),
    "fold_queries": Spec("_fold_kernel", lambda: fold.fold_queries(queries(16), planned(16), KV_HEADS, 5), 64),
    "fill_entries": Spec("_entries_kernel", _entries, 96),
    "merge_entries": Spec("_merge_entries_kernel", _merge_entries, 64),
    "store_rows": Spec("_store_kernel", _store, 64),
    "page_bounds": Spec("_summary_kernel", _store, 64),
    "page_bounds_and_moments": Spec("_summary_kernel", lambda: _store(moments=True), 64),
    "experts_gate_few": Spec("_gate_kernel", lambda: _experts(256), 80, 24 * 1024),
    "experts_gate_many": Spec("_gate_kernel", lambda: _experts(2048), 160, 56 * 1024),
    "experts_down_few": Spec("_down_kernel", lambda: _experts(256), 80, 24 * 1024),
    "experts_down_many": Spec("_down_kernel", lambda: _experts(2048), 216, 40 * 1024),
    "prefix_mass": Spec("_mass_kernel", _mass, 144, 50 * 1024),
}
