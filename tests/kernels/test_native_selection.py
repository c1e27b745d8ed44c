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


def reference_choice(world: World, rows: Tensor, whole: list[bool], best: list[int]) -> list[list[int]]:
    """Per segment and KV head the chosen pages, by the reference."""
    lists: list[list[int]] = []
    groups = world.pages.kv_heads
    for index in range(len(world.lengths)):
        _, mine = world.rows(index, rows)
        if whole[index] or not len(mine) or not world.lengths[index]:
            lists += [[] for _ in range(groups)]
            continue
        scores = ref.share_scores(reference_scores(world, index, world.q[mine]), groups)
        count = torch.full((len(mine),), min(best[index], scores.shape[-1]))
        chosen = ref.union_rows(ref.top_pages(scores, count), torch.zeros(len(mine), dtype=torch.int64), 1)[0]
        lists += [chosen[head].nonzero().flatten().tolist() for head in range(groups)]
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
def test_the_same_choice_alone_in_company_and_with_two_threads(level: str) -> None:
    kernels, world = require_native(level), make_world([9000, 70, 18000], dim=16, page=4)
    best = torch.tensor([50, 3, 700])
    whole, before = [False] * 3, torch.get_num_threads()
    single = selection.select_pages(kernels, world.pages, world.segments, world.q, None, whole, best)
    torch.set_num_threads(2)
    both = selection.select_pages(kernels, world.pages, world.segments, world.q, None, whole, best)
    torch.set_num_threads(before)
    assert torch.equal(single.indptr, both.indptr) and torch.equal(single.indices, both.indices)
    ends = single.indptr[::2].tolist()
    for index in range(3):
        one = world.alone(index)
        alone = selection.select_pages(kernels, one.pages, one.segments, one.q, None, [False], best[index : index + 1])
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
    rows = selection.changed_rows(kernels, now.flatten(0, 1), memory, slots, fresh, keep, share)
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
    rows = selection.changed_rows(kernels, now, memory, zero, [False], zero + 3, none)
    assert rows.tolist() == [0, 1, 2]
    assert selection.changed_rows(kernels, now, memory, zero, [False], zero, none).tolist() == []
