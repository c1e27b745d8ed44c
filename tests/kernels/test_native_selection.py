"""The C++ selection against the reference: bounds, identical pages with ties, changed rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.native import selection
from losa_kernels.reference import selection as ref
from tests.kernels.native import World, each_level, make_world, require_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference_scores(world: World, segment: int, q: Tensor) -> Tensor:
    bounds = world.pages.bounds
    assert bounds is not None
    return ref.page_scores(q, bounds[world.tables[segment]])


def reference_choice(
    world: World,
    rows: Tensor,
    whole: list[bool],
    best: list[int],
    share: ref.Share = "max",
    per_row: bool = False,
    heads: Tensor | None = None,
) -> list[list[int]]:
    """The chosen pages per segment (or row) and KV head (or query head), by the reference."""
    lists: list[list[int]] = []
    groups = world.pages.kv_heads
    for index in range(len(world.lengths)):
        place, mine = world.rows(index, rows)
        if whole[index] or not len(mine) or not world.lengths[index]:
            owners = len(mine) if per_row else 1
            lists += [[] for _ in range(owners * (world.q.shape[1] if share == "none" else groups))]
            continue
        taking = None if heads is None else heads[place]
        scores = ref.share_scores(reference_scores(world, index, world.q[mine]), groups, share, taking)
        chosen = ref.top_pages(scores, torch.full((len(mine),), min(best[index], scores.shape[-1])))
        if taking is not None:
            chosen &= ref.share_heads(taking, groups, share)[..., None]
        owned = chosen if per_row else ref.union_rows(chosen, torch.zeros(len(mine), dtype=torch.int64), 1)
        lists += [line.nonzero().flatten().tolist() for line in owned.flatten(0, 1)]
    return lists


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "share"), [(8, 1), (64, 2), (80, 8), (128, 5), (256, 3), (32, 70)])
def test_bounds_of_some_rows(level: str, dtype: torch.dtype, dim: int, share: int) -> None:
    kernels, world = require_native(level), make_world([20, 0, 1100], heads=2 * share, dim=dim, dtype=dtype)
    rows = torch.tensor([1, 2, 16, 17, 23])
    scores = selection.page_scores(kernels, world.pages, world.segments, world.q, rows, 70)
    assert scores.shape == (5, 2 * share, 70)
    for index, pages in ((0, 2), (2, 69)):
        place, mine = world.rows(index, rows)
        want = reference_scores(world, index, world.q[mine])
        torch.testing.assert_close(scores[place][..., :pages], want, rtol=1e-5, atol=1e-4)
        assert bool((scores[place][..., pages:] == -torch.inf).all())


@each_level
@pytest.mark.parametrize("quantum", [None, 0.25, 8.0])
@pytest.mark.parametrize(("heads", "kv_heads", "block"), [(4, 2, 8), (8, 8, 4), (8, 1, 32), (70, 1, 4)])
def test_the_reference_chooses_the_same_pages(
    level: str, quantum: float | None, heads: int, kv_heads: int, block: int
) -> None:
    """Small multiples of a power of two have exact sums and many ties; both must go to the lowest page."""
    kernels = require_native(level)
    lengths = [300, 16, 0, 500, 1700, 90]
    world = make_world(lengths, heads, kv_heads, dim=16, page=4, block=block, quantum=quantum)
    rows = torch.rand(len(lengths) * block) < 0.6
    rows[3 * block : 4 * block] = False  # one segment has no active row
    whole, best = [False, False, False, False, False, True], [5, 4, 2, 3, 40, 7]
    active = rows.nonzero().flatten()
    got = selection.select_pages(kernels, world.pages, world.segments, world.q, active, whole, torch.tensor(best))
    want = reference_choice(world, active, whole, best)
    found = [got.indices[a:b].tolist() for a, b in zip(got.indptr[:-1], got.indptr[1:], strict=True)]
    assert found == want
    counts = torch.bincount(active // block, minlength=len(lengths)).tolist()
    assert got.seen == [0 if skip else count for skip, count in zip(whole, counts, strict=True)]


@each_level
@pytest.mark.parametrize("share", ["max", "mean", "none"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("some_heads", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (70, 1), (4, 4)])
def test_lists_of_every_kind(
    level: str, share: ref.Share, per_row: bool, some_heads: bool, heads: int, kv_heads: int
) -> None:
    """Per KV head or query head, per segment or row, of all query heads or some: ties included, as above."""
    kernels, lengths, block = require_native(level), [300, 0, 90, 500, 60], 8
    world = make_world(lengths, heads, kv_heads, dim=8, page=4, block=block, quantum=0.5)
    rows = torch.rand(len(lengths) * block) < 0.6
    rows[3 * block : 4 * block] = False
    whole, best, active = [False, False, True, False, False], [5, 1, 2, 3, 7], rows.nonzero().flatten()
    taking = torch.rand(len(active), heads) < 0.4 if some_heads else None
    asked = (active, whole, torch.tensor(best), share, per_row, taking)
    got = selection.select_pages(kernels, world.pages, world.segments, world.q, *asked)
    found = [got.indices[a:b].tolist() for a, b in zip(got.indptr[:-1], got.indptr[1:], strict=True)]
    assert got.heads == (heads if share == "none" else kv_heads)
    assert found == reference_choice(world, active, whole, best, share, per_row, taking)
    every = selection.select_pages(kernels, world.pages, world.segments, world.q, None, *asked[1:5])
    assert len(every.indptr) == (len(world.q) if per_row else len(lengths)) * got.heads + 1


@each_level
def test_equal_pages_are_taken_from_the_front(level: str) -> None:
    kernels, world = require_native(level), make_world([160], kv_heads=1)
    assert world.pages.bounds is not None
    world.pages.bounds[:] = 1.0
    got = selection.select_pages(kernels, world.pages, world.segments, world.q, None, [False], torch.tensor([3]))
    assert got.indices.tolist() == [0, 1, 2] and got.seen == [world.block]
    world.pages.bounds[world.tables[0][[4, 7]]] = 100.0
    world.q[:] = world.q.abs()
    got = selection.select_pages(kernels, world.pages, world.segments, world.q, None, [False], torch.tensor([3]))
    assert got.indices.tolist() == [0, 4, 7]


@each_level
def test_everything_skipped_and_no_rows(level: str) -> None:
    kernels, world = require_native(level), make_world([50, 60])
    best, none = torch.tensor([2, 2]), torch.empty(0, dtype=torch.int64)
    for rows, whole in ((None, [True, True]), (none, [False, False])):
        got = selection.select_pages(kernels, world.pages, world.segments, world.q, rows, whole, best)
        assert got.indptr.tolist() == [0] * 5 and got.indices.shape == (0,) and got.seen == [0, 0]


@each_level
@pytest.mark.parametrize(("share", "per_row"), [("max", False), ("max", True), ("mean", False), ("none", True)])
def test_the_same_choice_alone_in_company_and_with_two_threads(level: str, share: ref.Share, per_row: bool) -> None:
    kernels, world = require_native(level), make_world([9000, 70, 18000], dim=16, page=4)
    best, kind = torch.tensor([50, 3, 700]), (share, per_row)
    whole, before = [False] * 3, torch.get_num_threads()
    single = selection.select_pages(kernels, world.pages, world.segments, world.q, None, whole, best, *kind)
    torch.set_num_threads(2)
    both = selection.select_pages(kernels, world.pages, world.segments, world.q, None, whole, best, *kind)
    torch.set_num_threads(before)
    assert torch.equal(single.indptr, both.indptr) and torch.equal(single.indices, both.indices)
    ends = single.indptr[:: single.heads * (world.block if per_row else 1)].tolist()
    for index in range(3):
        one, most = world.alone(index), best[index : index + 1]
        alone = selection.select_pages(kernels, one.pages, one.segments, one.q, None, [False], most, *kind)
        assert torch.equal(alone.indices, single.indices[ends[index] : ends[index + 1]])


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "width"), [(4, 7), (16, 256), (32, 130)])
def test_changed_rows_by_every_rule(level: str, dtype: torch.dtype, block: int, width: int) -> None:
    kernels, segments = require_native(level), 6
    memory = torch.randn(9, block, 1, width).to(dtype)
    slots = torch.tensor([3, 8, 0, 5, 1, 2])
    change = torch.rand(segments, block, 1, 1) ** 3 * torch.randn(segments, block, 1, width)
    now = (memory[slots].float() + change).to(dtype)
    fresh = [False, True, False, False, False, False]
    keep = torch.tensor([2, 0, 0, block, 0, 1])
    share = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.9])
    before = memory.clone()
    rows = selection.changed_rows(kernels, now.flatten(0, 1), memory, slots, fresh, keep, share).rows
    want = ref.active_rows(ref.query_change(now, before[slots]), keep, share)
    want[1] = True
    assert rows.tolist() == want.flatten().nonzero().flatten().tolist()
    assert torch.equal(memory[slots], now)
    others = torch.tensor([4, 6, 7])
    assert torch.equal(memory[others], before[others])


@each_level
def test_equal_changes_go_to_the_first_rows(level: str) -> None:
    kernels = require_native(level)
    memory, now = torch.zeros(1, 8, 1, 4), torch.ones(8, 1, 4)
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    rows = selection.changed_rows(kernels, now, memory, zero, [False], zero + 3, none).rows
    assert rows.tolist() == [0, 1, 2]
    assert selection.changed_rows(kernels, now, memory, zero, [False], zero, none).rows.tolist() == []


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_stable", [False, True])
def test_changed_heads_and_what_stays_remembered(level: str, dtype: torch.dtype, keep_stable: bool) -> None:
    """Each head has a ranking of its own; with keep_stable only what is active replaces the earlier queries."""
    kernels, segments, block, heads = require_native(level), 5, 8, 6
    memory = torch.randn(7, block, heads, 20).to(dtype)
    slots = torch.tensor([3, 6, 0, 5, 1])
    change = torch.rand(segments, block, heads, 1) ** 3 * torch.randn(segments, block, heads, 20)
    now, before = (memory[slots].float() + change).to(dtype), memory.clone()
    fresh = [False, True, False, False, False]
    keep, share = torch.tensor([2, 0, 0, block, 0]), torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0])
    rules = (slots, fresh, keep, share, keep_stable)
    got = selection.changed_rows(kernels, now.flatten(0, 1), memory, *rules, per_head=True)
    every = ref.query_change(now, before[slots], per_head=True).transpose(1, 2)  # [S, H, B]
    want = torch.stack([ref.active_rows(every[:, head], keep, share) for head in range(heads)], dim=2)
    want[1] = True
    assert torch.equal(got.parts, want.flatten(0, 1))
    assert got.rows.tolist() == want.flatten(0, 1).any(1).nonzero().flatten().tolist()
    assert 0 < want[0].sum() == 2 * heads and not want[4].any()
    replaced = want[..., None] if keep_stable else torch.ones_like(want)[..., None]
    assert torch.equal(memory[slots], torch.where(replaced, now, before[slots]))
    assert torch.equal(memory[[2, 4]], before[[2, 4]])


@each_level
def test_a_row_kept_as_reference_is_compared_with_its_last_refresh(level: str) -> None:
    kernels = require_native(level)
    memory, zero = torch.zeros(1, 4, 2, 4), torch.zeros(1, dtype=torch.int64)
    steps = [torch.tensor([0.0, 1.0, 3.0, 0.5])[:, None, None] * torch.ones(4, 2, 4) * n for n in range(1, 5)]
    rules = (zero, [False], zero + 1, torch.zeros(1))
    last, drift = ([], [])
    for found, keep_stable in ((last, False), (drift, True)):
        memory.zero_()
        for now in steps:
            found += selection.changed_rows(kernels, now, memory, *rules, keep_stable).rows.tolist()
    assert last == [2] * 4 and drift == [2, 2, 1, 2]  # row 1 has come as far after three steps as row 2 does in one
