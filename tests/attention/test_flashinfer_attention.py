"""Plans, page lists, folding, base conversion and merging around FlashInfer, with a stand-in that computes plainly."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from losa_runtime.attention import flashinfer_attention
from losa_runtime.attention.flashinfer_attention import FlashInferAttention, Span
from tests.attention.fake_flashinfer import FakeWrapper
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, lists_of, make_world, plan

HALF = {"rtol": 2e-3, "atol": 2e-3}


def attention_for(world: World, heads: int = 4, processors: int = 12) -> FlashInferAttention:
    pages = world.pages
    about = (heads, pages.kv_heads, pages.head_dim, pages.page_size, world.scale, torch.float16, DEVICE, processors)
    return FlashInferAttention(FakeWrapper, *about)


def check(found: tuple[Tensor, Tensor], place: slice, want: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0][place], want[0], **HALF)
    torch.testing.assert_close(found[1][place], want[1], **HALF)


def test_dense_spans() -> None:
    """Rows of unlike number, prefixes that end within a page, and one without keys."""
    world = make_world([20, 0, 64, 37], dtype=torch.float16)
    spans = [Span(8, table, length) for table, length in zip(world.tables, world.lengths, strict=True)]
    spans[2:3] = [Span(3, world.tables[2], 64), Span(5, world.tables[2][:3], 40)]
    attention = attention_for(world)
    found = attention.dense(attention.plan(spans), world.q, world.pages)
    for segment in (0, 1, 3):
        check(found, slice(8 * segment, 8 * segment + 8), world.whole(segment, world.q[8 * segment : 8 * segment + 8]))
    assert not found[0][8:16].any() and bool((found[1][8:16] == -torch.inf).all())
    check(found, slice(16, 19), world.whole(2, world.q[16:19]))
    cut = make_world([1])  # only for its class: the first 40 tokens of the third prefix
    cut = World(world.pages, cut.segments, [world.tables[2]], [40], world.q)
    check(found, slice(19, 24), cut.whole(0, world.q[19:24]))


def test_a_plan_lives_until_its_forward_is_over_and_its_wrapper_serves_the_next() -> None:
    world = make_world([20], dtype=torch.float16)
    attention = attention_for(world)
    FakeWrapper.made = 0
    first = attention.plan([Span(8, world.tables[0], 20)])
    second = attention.plan([Span(8, world.tables[0], 16)])
    assert first.wrapper is not second.wrapper and FakeWrapper.made == 2
    check(attention.dense(first, world.q, world.pages), slice(0, 8), world.whole(0, world.q))
    wrapper = first.wrapper
    del first
    gc.collect()
    assert attention.plan([Span(8, world.tables[0], 4)]).wrapper is wrapper and FakeWrapper.made == 2


def lists_for(world: World, heads: int, granule: int, whole: list[bool]) -> tuple[list[list[int]], int]:
    """Some granules per segment and head, always with the last one of the prefix; the granules of the longest list."""
    chosen: list[list[int]] = []
    for length, all_ in zip(world.lengths, whole, strict=True):
        ends = -(-length // granule)
        for head in range(heads):
            some = [] if all_ or not ends else sorted({ends - 1, *torch.randperm(ends)[: 1 + head].tolist()})
            chosen.append(some)
    return chosen, max(world.lengths)


@pytest.mark.parametrize(
    ("heads", "list_heads", "granule", "processors"),
    [(4, 2, 16, 1), (4, 2, 16, 40), (4, 4, 16, 12), (8, 2, 1, 40), (2, 2, 4, 12)],
)
def test_listed_rows(
    heads: int, list_heads: int, granule: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or several splits; one segment reads everything, one has no row, one no prefix."""
    monkeypatch.setattr(flashinfer_attention, "SPLIT_KEYS", 16)
    world = make_world([70, 37, 33, 0, 80], heads, 2, dtype=torch.float16, block=4)
    rows = [1, 2, 4, 5, 6, 7, 12, 17, 19]
    whole = [False, True, False, False, False]
    chosen, most = lists_for(world, list_heads, granule, whole)
    lists = lists_of(chosen, list_heads, granule, whole, most)
    attention = attention_for(world, heads, processors)
    assert attention.can_list(lists)
    found = attention.listed(world.q, plan(world, rows), world.pages, world.segments, lists)
    for segment in range(5):
        mine = [place for place, row in enumerate(rows) if row // world.block == segment]
        if not mine:
            continue
        q = world.q[[rows[place] for place in mine]]
        listed = chosen[segment * list_heads : (segment + 1) * list_heads]
        want = world.whole(segment, q) if whole[segment] else world.listed(segment, q, listed, granule)
        check(found, slice(mine[0], mine[-1] + 1), want)


def test_planned_rows_read_whole_prefixes_without_lists() -> None:
    world = make_world([20, 0, 64], dtype=torch.float16)
    rows = [0, 3, 9, 16, 23]
    found = attention_for(world).listed(world.q, plan(world, rows), world.pages, world.segments, None)
    for segment, places in ((0, slice(0, 2)), (1, slice(2, 3)), (2, slice(3, 5))):
        check(found, places, world.whole(segment, world.q[rows[places]]))


def test_a_listed_plan_serves_all_lists_of_its_kind() -> None:
    """Lengths, lists and rows change under it, and with them nothing is planned or allocated for good."""
    attention = attention_for(make_world([1], dtype=torch.float16))
    FakeWrapper.made = 0
    for lengths, rows in (([50, 20, 36], [0, 9, 23]), ([33, 64, 0, 16], [5, 30]), ([60, 61, 62], list(range(24)))):
        world = make_world(lengths, dtype=torch.float16)
        lists = lists_of([[0], [0]] * len(lengths), 2, 16, [True] * len(lengths), 64)
        found = attention.listed(world.q, plan(world, rows), world.pages, world.segments, lists)
        for place, row in enumerate(rows):
            check(found, slice(place, place + 1), world.whole(row // 8, world.q[row : row + 1]))
    assert FakeWrapper.made == 1


def test_lists_that_it_cannot_take() -> None:
    world = make_world([40], dtype=torch.float16)
    attention = attention_for(world)
    assert not attention.can_list(lists_of([[0]] * 2, 2, 32, [False], 32))
    assert not attention.can_list(lists_of([[0]] * 16, 2, 16, [False], 16, per_row=True))
