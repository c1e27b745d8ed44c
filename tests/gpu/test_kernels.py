"""Every Triton kernel in bfloat16, at the sizes of TraDo-8B, on the device itself against the reference.

In other types and at odd sizes tests/kernels does it, on a GPU too if there is one. The interpreter cannot do it: its
products of bfloat16 are wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.reference import paging, selection
from losa_kernels.triton.active import active_rows, plan_rows
from losa_kernels.triton.block import Fresh, Kept, attend_block, finish_block
from losa_kernels.triton.change import keep_changed, query_change
from losa_kernels.triton.choose import page_bars
from losa_kernels.triton.experts import mix_experts
from losa_kernels.triton.fold import fold_queries
from losa_kernels.triton.layout import Pages, Parts, Planned
from losa_kernels.triton.mass import prefix_mass
from losa_kernels.triton.merge import merge_parts, merge_states
from losa_kernels.triton.prefill import StoredRows, Tiles, attend_stored, tile_numbers
from losa_kernels.triton.prefix import attend_prefix
from losa_kernels.triton.scores import page_scores
from losa_kernels.triton.store import store_rows
from losa_kernels.triton.unite import page_lists
from tests.kernels.experts import Mixture, make_mixture
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, found_lists, lists_of, make_world, plan

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
HEADS, KV_HEADS, DIM, PAGE, BLOCK = 32, 8, 128, 16, 16
LENGTHS = [0, 5, 1000, 4112]
BEST = [1, 12, 64]  # pages of the requests with a prefix
SOME = [0, 3, 17, 30, 33, 40, 47, 50]  # rows of every request


def make(lengths: list[int] | None = None, **more: Any) -> World:
    return make_world(LENGTHS if lengths is None else lengths, HEADS, KV_HEADS, DIM, PAGE, BLOCK, DTYPE, **more)


def close(got: Tensor, want: Tensor) -> None:
    """Weights are rounded to 8 bits before they meet the values."""
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-3)


def on(values: list[Any]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("chunk", [256, 8192])
def test_whole_prefixes_and_their_peaks(chunk: int) -> None:
    world, planned = make(), None
    planned = Planned.every(world.segments)
    peaks = torch.empty(len(world.q), HEADS, -(-max(LENGTHS) // PAGE), device=DEVICE)
    parts = attend_prefix(world.q, planned, world.pages, world.segments, world.scale, None, chunk, peaks)
    out, lse = merge_parts(parts, planned)
    for index, length in enumerate(LENGTHS):
        rows = world.rows(index)
        want = world.whole(index, world.q[rows])
        close(out[rows], want[0])
        torch.testing.assert_close(lse[rows], want[1], rtol=1e-3, atol=1e-3)
        if length:
            found = selection.page_peaks(world.q[rows], world.keys(index)[0], world.scale, PAGE)
            torch.testing.assert_close(peaks[rows][..., : found.shape[-1]], found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("granule", [1, PAGE])
def test_lists(heads: int, per_row: bool, granule: int) -> None:
    world, planned = make(), plan(make(), SOME)
    owners = [row // BLOCK for row in SOME] if per_row else list(range(len(LENGTHS)))
    chosen = []
    for owner in owners:
        there = -(-LENGTHS[owner] // granule)
        chosen += [sorted(torch.randperm(there)[: min(there, 200 // granule)].tolist()) for _ in range(heads)]
    room = [[] for _ in range((len(world.q) - len(SOME)) * heads)] if per_row else []
    lists = lists_of(chosen + room, heads, granule, [False] * len(LENGTHS), 208, per_row)
    parts = attend_prefix(world.q, planned, world.pages, world.segments, world.scale, lists, 128)
    out, lse = merge_parts(parts, planned)
    for place, row in enumerate(SOME):
        mine = place if per_row else row // BLOCK
        listed = chosen[mine * heads : (mine + 1) * heads]
        want = world.listed(row // BLOCK, world.q[row : row + 1], listed, granule)
        close(out[place], want[0][0])
        torch.testing.assert_close(lse[place], want[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [64, 128])
def test_stored_rows(size: int) -> None:
    lengths, starts = [64, 1008, 4112], [0, 992, 3072]
    world, counts = make(lengths), [64, 16, 1040]
    firsts, tables = [0, 64, 80], [0, 4, 67]
    rows = [StoredRows(*about) for about in zip(firsts, counts, starts, tables, strict=True)]
    tiles = Tiles(on(tile_numbers(rows, HEADS // KV_HEADS, size)), torch.cat(world.tables), size, max(lengths))
    q = torch.randn(sum(counts), HEADS, DIM, device=DEVICE).to(DTYPE)
    out, _ = merge_parts(attend_stored(q, tiles, world.pages, world.scale, BLOCK, 1024))
    for index, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        mine = q[first : first + count].float()
        where = (world.pages.k, world.pages.v, world.tables[index], starts[index], BLOCK, world.scale)
        close(out[first : first + count], ref.block_causal_attention(mine, *where))


def test_a_layers_end() -> None:
    """Blocks by themselves; and with fresh states for some rows, remembered ones for the others."""
    world = make()
    rows, planned = len(world.q), plan(world, SOME)
    k, v = (torch.randn(rows, KV_HEADS, DIM, device=DEVICE).to(DTYPE) for _ in range(2))
    blocks = (x.float().view(-1, BLOCK, *x.shape[1:]) for x in (world.q, k, v))
    own = tuple(x.flatten(0, 1) for x in ref.block_attention(*blocks, world.scale))
    got = attend_block(world.q, k, v, BLOCK, world.scale)
    close(got[0], own[0])
    torch.testing.assert_close(got[1], own[1], rtol=1e-3, atol=1e-3)
    place = torch.randperm(6 * BLOCK, device=DEVICE)[:rows]
    kept = Kept(torch.randn(6 * BLOCK, HEADS, DIM, device=DEVICE), torch.randn(6 * BLOCK, HEADS, device=DEVICE), place)
    parts = Parts(torch.randn(2, rows, HEADS, DIM, device=DEVICE), torch.randn(2, rows, HEADS, device=DEVICE))
    out, lse = kept.out[place], kept.lse[place]
    new = ref.merge_states(parts.out[0], parts.lse[0], parts.out[1], parts.lse[1])
    out[SOME], lse[SOME] = new[0][: len(SOME)], new[1][: len(SOME)]
    merged = finish_block(world.q, k, v, BLOCK, world.scale, kept, Fresh(parts, planned))
    close(merged, ref.merge_states(out, lse, *own)[0])
    torch.testing.assert_close(kept.out[place], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.lse[place], lse, rtol=1e-5, atol=1e-5)
    every = Planned.every(world.segments)
    forgotten = finish_block(world.q, k, v, BLOCK, world.scale, None, Fresh(parts, every))
    close(forgotten, ref.merge_states(*new, *own)[0])


def test_states_are_merged() -> None:
    a, b = (torch.randn(70, HEADS, DIM, device=DEVICE) for _ in range(2))
    lse_a, lse_b = torch.randn(70, HEADS, device=DEVICE), torch.randn(70, HEADS, device=DEVICE)
    got, want = merge_states(a, lse_a, b, lse_b), ref.merge_states(a, lse_a, b, lse_b)
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_which_rows_changed(per_head: bool, keep: bool) -> None:
    count = 5
    now = torch.randn(count, BLOCK, HEADS, DIM, device=DEVICE).to(DTYPE)
    memory = torch.randn(8, BLOCK, HEADS, DIM, device=DEVICE).to(DTYPE)
    before, slots, fresh = memory.clone(), on([7, 0, 3, 2, 5]), on([False, False, True, False, False])
    change = query_change(now.flatten(0, 1), before, slots, fresh, per_head, replace=not keep)
    want = selection.query_change(now, memory[slots], per_head=True)
    want = want if per_head else want.mean(-1, keepdim=True)
    torch.testing.assert_close(change[~fresh], want.transpose(1, 2)[~fresh], rtol=1e-4, atol=1e-6)
    counts, taus = on([3, 0, 0, 16, 1]), on([0.0, 0.5, 0.0, 0.0, 0.9])
    active = active_rows(change, counts, taus, fresh)
    parts = change.shape[1]
    rules = (counts.repeat_interleave(parts), taus.repeat_interleave(parts))
    chosen = selection.active_rows(change.flatten(0, 1), *rules).view(count, parts, BLOCK).transpose(1, 2)
    chosen[2] = True
    assert torch.equal(active, chosen.flatten(0, 1))
    if keep:
        keep_changed(now.flatten(0, 1), before, slots, active)
        renewed = chosen.repeat_interleave(HEADS // parts, dim=2)[..., None]
        assert torch.equal(before[slots], torch.where(renewed, now, memory[slots]))
    else:
        assert torch.equal(before[slots], now)
    planned = plan_rows(active, BLOCK)
    listed = active.any(1).nonzero().flatten()
    assert torch.equal(planned.rows[: len(listed)], listed) and int(planned.indptr[-1]) == len(listed)
    assert torch.equal(planned.order[listed], torch.arange(len(listed), device=DEVICE))


@pytest.mark.parametrize("share", ["max", "mean", "none"])
@pytest.mark.parametrize("per_row", [False, True])
def test_pages_are_chosen(share: selection.Share, per_row: bool) -> None:
    """Queries and keys are small multiples of a power of two: sums are exact, and ties real."""
    world = make(LENGTHS[1:], quantum=0.25)
    rows = [0, 5, 17, 20, 31, 40]
    planned, skipped, best = plan(world, rows), on([True, False, False]), on(BEST)
    scores = page_scores(world.q, planned, world.pages, world.segments, skipped, share)
    bars = page_bars(scores, planned, world.segments, PAGE, best, skipped, 8192)
    capacity = scores.shape[1] * scores.shape[2] * (len(world.q) if per_row else 3)
    found = found_lists(page_lists(scores, bars, planned, world.segments, PAGE, skipped, capacity, 4112, per_row))
    want: list[list[int]] = [] if per_row else [[] for _ in range(scores.shape[1])]
    for index in (1, 2):
        mine = [row for row in rows if row // BLOCK == index]
        exact = selection.page_scores(world.q[mine], world.bounds(index))
        exact = selection.share_scores(exact, KV_HEADS, share)
        chosen = selection.top_pages(exact, best[index].expand(len(mine)))
        chosen = chosen if per_row else chosen.any(0, keepdim=True)
        want += [line.nonzero().flatten().tolist() for line in chosen.flatten(0, 1)]
    if per_row:
        first = sum(row < BLOCK for row in rows) * scores.shape[1]
        want = [[] for _ in range(first)] + want
        want += [[] for _ in range((len(world.q) - len(rows)) * scores.shape[1])]
    assert found == want


def test_queries_are_folded() -> None:
    world = make()
    folded = fold_queries(world.q, plan(world, SOME), KV_HEADS, BLOCK)
    for index in range(len(LENGTHS)):
        mine = [row for row in SOME if row // BLOCK == index]
        want = world.q[mine].view(len(mine), KV_HEADS, -1, DIM).transpose(0, 1)
        assert torch.equal(folded[index, :, 0, : len(mine)], want) and not folded[index, :, 0, len(mine) :].any()


@pytest.mark.parametrize("granule", [1, PAGE, 100])
@pytest.mark.parametrize("over_rows", ["mean", "max"])
def test_mass_of_granules(granule: int, over_rows: Any) -> None:
    world = make(LENGTHS[1:])
    lse = torch.randn(len(world.q), HEADS, device=DEVICE) + 6.0
    mass = prefix_mass(world.q, lse, world.pages, world.segments, world.scale, granule, over_rows)
    for index in range(3):
        rows, keys = world.rows(index), world.keys(index)[0]
        want = selection.key_mass(world.q[rows], lse[rows], keys, world.scale, granule, over_rows)
        torch.testing.assert_close(mass[index, :, : want.shape[1]], want, rtol=1e-2, atol=1e-5)


def test_rows_and_summaries_are_stored() -> None:
    shape, summary = (40, KV_HEADS, PAGE, DIM), (40, KV_HEADS, 2, DIM)
    k, v = (torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(2))
    pages = Pages(k, v, torch.zeros(summary, device=DEVICE, dtype=DTYPE), torch.zeros(summary, device=DEVICE))
    at = torch.arange(3 * PAGE + 5, device=DEVICE)
    locations = on([7, 3, 30, 31])[at // PAGE] * PAGE + at % PAGE
    rows = [torch.randn(len(at), KV_HEADS, DIM, device=DEVICE).to(DTYPE) for _ in range(2)]
    filled = torch.zeros(40, dtype=torch.int32, device=DEVICE)
    store_rows(pages, *rows, locations, filled)
    assert torch.equal(k[locations // PAGE, :, locations % PAGE], rows[0])
    assert torch.equal(v[locations // PAGE, :, locations % PAGE], rows[1]) and not filled.any()
    touched, counts = paging.touched_pages(locations, PAGE)
    assert pages.bounds is not None and torch.equal(pages.bounds[touched], paging.key_bounds(k[touched], counts))
    assert pages.moments is not None
    torch.testing.assert_close(pages.moments[touched], paging.key_moments(k[touched], counts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("tokens", [3, 256, 2048])
def test_experts(tokens: int, crowded: bool) -> None:
    """A few, some and many tokens for each; what lies between two products is rounded to 8 bits."""
    made = make_mixture(tokens, experts=64, per_token=8, hidden=512, width=256, dtype=DTYPE, crowded=crowded)
    mixture = Mixture(*(x.to(DEVICE) for x in made))
    found, exact = mix_experts(*mixture), mixture.exact
    assert (found.double() - exact).abs().max() < 1e-2 * exact.abs().max()
    some = mix_experts(*mixture.tokens(torch.arange(3, device=DEVICE)), same_bits=True)
    assert torch.equal(some, mix_experts(*mixture, same_bits=True)[:3])
