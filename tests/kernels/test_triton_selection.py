"""The Triton selection of pages against the reference: bounds, identical pages with ties, lists made on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import selection as ref
from losa_kernels.triton import choose
from losa_kernels.triton.choose import page_bars
from losa_kernels.triton.layout import Lists, Pages
from losa_kernels.triton.scores import page_scores
from losa_kernels.triton.unite import page_lists
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, found_lists, make_world, plan


def on_device(values: list[int] | list[bool]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def select(
    world: World,
    rows: list[int],
    best: list[int],
    whole: list[bool],
    share: ref.Share = "max",
    per_row: bool = False,
    heads: Tensor | None = None,
    context_pages: int = 512,
) -> Lists:
    """Scores, bars and lists, one after another."""
    planned, page, skipped = plan(world, rows), world.pages.page_size, on_device(whole)
    found = page_scores(world.q, planned, world.pages, world.segments, skipped, share, heads)
    bars = page_bars(found, planned, world.segments, page, on_device(best), skipped, context_pages, heads)
    capacity = found.shape[1] * found.shape[2] * (len(world.q) if per_row else len(world.lengths))
    return page_lists(found, bars, planned, world.segments, page, skipped, capacity, world.segments.longest, per_row)


def reference_choice(
    world: World,
    rows: list[int],
    best: list[int],
    whole: list[bool],
    share: ref.Share = "max",
    per_row: bool = False,
    heads: Tensor | None = None,
) -> list[list[int]]:
    """The chosen pages of every list; rows that are not planned have empty ones, behind the others."""
    groups = world.pages.kv_heads
    per_owner = world.q.shape[1] if share == "none" else groups
    lists: list[list[int]] = []
    for index in range(len(world.lengths)):
        place = [number for number, row in enumerate(rows) if row // world.block == index]
        owners = len(place) if per_row else 1
        if whole[index] or not place or not world.lengths[index]:
            lists += [[] for _ in range(owners * per_owner)]
            continue
        mine = [rows[number] for number in place]
        taking = None if heads is None else heads[place]
        scores = ref.share_scores(ref.page_scores(world.q[mine], world.bounds(index)), groups, share, taking)
        chosen = ref.top_pages(scores, torch.full((len(mine),), min(best[index], scores.shape[-1]), device=DEVICE))
        if taking is not None:
            chosen &= ref.share_heads(taking, groups, share)[..., None]
        if not per_row:
            chosen = ref.union_rows(chosen, torch.zeros(len(mine), dtype=torch.int64, device=DEVICE), 1)
        lists += [line.nonzero().flatten().tolist() for line in chosen.flatten(0, 1)]
    if per_row:
        lists += [[] for _ in range((len(world.q) - len(rows)) * per_owner)]
    return lists


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("dim", "share", "kv_heads"), [(32, 1, 2), (64, 2, 1), (80, 3, 1), (128, 8, 1)])
@pytest.mark.parametrize("kind", ["max", "mean", "none"])
def test_bounds_of_some_rows(kind: ref.Share, dim: int, share: int, kv_heads: int, dtype: torch.dtype) -> None:
    world = make_world([20, 0, 300, 70], heads=share * kv_heads, kv_heads=kv_heads, dim=dim, page=8, dtype=dtype)
    rows = [1, 2, 8, 16, 17, 23, 30]
    skipped = on_device([False, False, False, True])
    scores = page_scores(world.q, plan(world, rows), world.pages, world.segments, skipped, kind)
    assert scores.shape == (len(world.q), share * kv_heads if kind == "none" else kv_heads, 38)
    for index, mine, pages in ((0, [0, 1], 3), (1, [2], 0), (2, [3, 4, 5], 38)):
        if pages:
            bounds = ref.page_scores(world.q[[rows[place] for place in mine]], world.bounds(index))
            want = ref.share_scores(bounds, kv_heads, kind)
            torch.testing.assert_close(scores[mine][..., :pages], want, rtol=1e-4, atol=1e-4)
        assert bool((scores[mine][..., pages:] == -torch.inf).all())


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_bounds_of_some_heads(kind: ref.Share) -> None:
    """A list without a head that takes part is left out of the comparison: its scores mean nothing."""
    world = make_world([100], heads=6, page=8, block=4)
    taking = torch.rand(4, 6, device=DEVICE) < 0.5
    taking[0, :3], taking[1, 0] = False, True
    rows = list(range(4))
    skipped = on_device([False])
    got = page_scores(world.q, plan(world, rows), world.pages, world.segments, skipped, kind, taking)
    want = ref.share_scores(ref.page_scores(world.q, world.bounds(0)), 2, kind, taking)
    real = ref.share_heads(taking, 2, kind)
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantum", [None, 0.25])
@pytest.mark.parametrize(("heads", "kv_heads", "block"), [(4, 2, 8), (8, 1, 4), (2, 2, 32)])
def test_the_reference_chooses_the_same_pages(quantum: float | None, heads: int, kv_heads: int, block: int) -> None:
    """Small multiples of a power of two have exact sums and many ties; both must go to the lowest page."""
    lengths = [100, 3, 0, 170, 300, 60]
    world = make_world(lengths, heads, kv_heads, dim=16, page=4, block=block, quantum=quantum)
    taken = torch.rand(len(lengths) * block) < 6 / (block * len(lengths))
    taken[0], taken[3 * block : 4 * block], taken[4 * block : 4 * block + 2] = True, False, True
    rows, whole, best = taken.nonzero().flatten().tolist(), [False] * 5 + [True], [5, 4, 2, 3, 20, 7]
    lists = select(world, rows, best, whole)
    assert found_lists(lists) == reference_choice(world, rows, best, whole)
    assert (lists.heads, lists.granule, lists.per_row) == (kv_heads, 4, False)


@pytest.mark.parametrize("share", ["max", "mean", "none"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("some_heads", [False, True])
def test_lists_of_every_kind(share: ref.Share, per_row: bool, some_heads: bool) -> None:
    """Per KV head or query head, per segment or row, of all query heads or some: ties included, as above."""
    world = make_world([100, 0, 90, 30], heads=4, dim=16, page=4, block=4, quantum=0.5)
    rows, whole, best = [0, 2, 3, 5, 8, 14], [False, False, True, False], [5, 1, 2, 3]
    heads = torch.rand(len(world.q), 4, device=DEVICE) < 0.4 if some_heads else None
    asked = (rows, best, whole, share, per_row, heads)
    assert found_lists(select(world, *asked)) == reference_choice(world, *asked)


def test_more_pages_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are then read again in several tiles, and ties counted across them."""
    monkeypatch.setattr(choose, "HELD_PAGES", 128)
    world = make_world([300, 20], heads=2, kv_heads=1, dim=16, page=1, block=4, quantum=0.5)
    asked = ([0, 1, 6], [140, 7], [False, False])
    assert found_lists(select(world, *asked)) == reference_choice(world, *asked)


def test_more_pages_than_a_step_lists() -> None:
    world = make_world([1100], heads=1, kv_heads=1, dim=16, page=1, block=4)
    asked = ([0, 2], [600], [False])
    assert found_lists(select(world, *asked, context_pages=2048)) == reference_choice(world, *asked)


def test_zeros_of_either_sign_are_level() -> None:
    world = make_world([9], heads=1, kv_heads=1, page=1, block=4)
    planned, skipped = plan(world, [0, 1]), on_device([False])
    row = [-1.0, -0.0, 0.0, -0.0, -2.0, 0.0, -1.0, 3.0, -0.0]
    scores = torch.tensor([row, row[::-1]] * 2, device=DEVICE)[:, None]
    bars = page_bars(scores, planned, world.segments, 1, on_device([4]), skipped, 64)
    per_row = page_lists(scores, bars, planned, world.segments, 1, skipped, 36, 9, per_row=True)
    assert found_lists(per_row) == [[1, 2, 3, 7], [0, 1, 3, 5], [], []]


def test_equal_pages_are_taken_from_the_front() -> None:
    """Also where every score is zero, or negative."""
    world = make_world([160], heads=1, kv_heads=1)
    assert world.pages.bounds is not None
    world.q[:] = 1.0
    for value in (1.0, 0.0, -3.0):
        world.pages.bounds[:] = value
        assert found_lists(select(world, [0, 5], [3], [False])) == [[0, 1, 2]]
    world.pages.bounds[:] = 0.0
    world.pages.bounds[world.tables[0][[4, 7]]] = 100.0
    assert found_lists(select(world, [0, 5], [3], [False])) == [[0, 4, 7]]


def test_everything_skipped_and_no_rows() -> None:
    world = make_world([50, 60])
    for rows, whole in (([0, 9], [True, True]), ([], [False, False])):
        assert found_lists(select(world, rows, [2, 2], whole)) == [[]] * 4


def test_the_same_choice_alone_and_in_company() -> None:
    world = make_world([700, 70, 300], dim=16, page=4, block=4)
    best = [20, 5, 9]
    rows = [1, 3, 5, 8, 11]
    together = found_lists(select(world, rows, best, [False] * 3))
    for index in range(3):
        mine = [row - 4 * index for row in rows if row // 4 == index]
        alone = found_lists(select(world.alone(index), mine, [best[index]], [False]))
        assert alone == together[2 * index : 2 * index + 2]


def test_what_does_not_fit_is_refused() -> None:
    world = make_world([50, 60])
    with pytest.raises(ValueError, match="whole: found shape"):
        page_scores(world.q, plan(world, [0]), world.pages, world.segments, on_device([False]))
    bare = World(Pages(world.pages.k, world.pages.v), world.segments, world.tables, world.lengths, world.q)
    with pytest.raises(ValueError, match="bounds: found None"):
        select(bare, [0], [1, 1], [False, False])
    scores = torch.zeros(16, 2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="heads: found 5, allowed: multiples of the 2 lists"):
        page_bars(
            scores,
            plan(world, [0]),
            world.segments,
            16,
            on_device([1, 1]),
            on_device([False, False]),
            64,
            torch.ones(16, 5, dtype=torch.bool, device=DEVICE),
        )
