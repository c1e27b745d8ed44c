"""Page lists as entries of paged attention, and entries' states as those of rows, against plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from losa_kernels.reference import attention as ref
from losa_kernels.triton.entries import Entries, fill_entries, merge_entries
from losa_kernels.triton.layout import Lists
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, lists_of, make_world, plan

EMPTY = -5e4


def nothing_filled(room: int, capacity: int) -> Entries:
    return Entries(*(torch.full((n,), -7, dtype=torch.int32, device=DEVICE) for n in (room + 1, capacity, room)))


def folded_pages(world: World, segment: int, head: int, heads: int, granule: int, listed: list[int]) -> list[int]:
    """What these granules of a prefix are called in the folded cache."""
    kv_heads, page = world.pages.kv_heads, world.pages.page_size
    found = []
    for number in listed:
        page_id = int(world.tables[segment][number * granule // page])
        inside = number * granule % page // granule
        found.append((page_id * kv_heads + head * kv_heads // heads) * (page // granule) + inside)
    return found


def check_entries(world: World, into: Entries, chosen: list[list[int]], heads: int, granule: int, splits: int) -> None:
    """`chosen`: granules per segment and list head, whole prefixes written out."""
    indptr, pages, last = (x.tolist() for x in into)
    at = 0
    for number, listed in enumerate(chosen):
        segment, head = number // heads, number % heads
        want = folded_pages(world, segment, head, heads, granule, listed)
        mine = range(number * splits, (number + 1) * splits)
        found = [pages[indptr[e] : indptr[e + 1]] for e in mine]
        assert [page for one in found for page in one] == want
        assert max(map(len, found)) <= -(-len(want) // splits)
        for e in mine:
            if indptr[e] == indptr[e + 1]:
                continue
            ends = indptr[e + 1] == at + len(want)
            rest = world.lengths[segment] - listed[-1] * granule if ends else granule
            assert last[e] == min(granule, rest)
        at += len(want)
    assert set(indptr[len(chosen) * splits :]) == {at}
    assert set(pages[at:]) <= {-7}


@pytest.mark.parametrize("splits", [1, 3])
def test_whole_prefixes(splits: int) -> None:
    """One of them is empty, one ends within a page; there is room for two more segments."""
    world = make_world([20, 0, 64])
    into = nothing_filled(5 * 2 * splits, 40)
    fill_entries(into, world.pages, world.segments, splits)
    chosen = [list(range(-(-length // 16))) for length in world.lengths for _ in range(2)]
    check_entries(world, into, chosen, 2, 16, splits)


@pytest.mark.parametrize(("heads", "granule"), [(2, 16), (4, 16), (2, 1), (4, 4)])
def test_lists(heads: int, granule: int) -> None:
    """The second segment reads everything; of the third, one list is empty and the others have the partial granule."""
    world = make_world([70, 37, 45, 33])
    ends = [-(-length // granule) for length in world.lengths]
    some = [sorted(torch.randperm(ends[segment])[: 3 + segment].tolist()) for segment in range(4) for _ in range(heads)]
    some[heads : 2 * heads] = [[] for _ in range(heads)]
    some[2 * heads] = []
    for head in range(1, heads):
        some[2 * heads + head] = [0, ends[2] - 1]
    lists = lists_of(some, heads, granule, [False, True, False, False], 70)
    into = nothing_filled(4 * heads * 2, 400)
    fill_entries(into, world.pages, world.segments, 2, lists)
    some[heads : 2 * heads] = [list(range(ends[1])) for _ in range(heads)]
    check_entries(world, into, some, heads, granule, 2)


def test_what_does_not_fit_is_not_written() -> None:
    world = make_world([64, 64])
    into = nothing_filled(4, 9)
    short = Entries(into.indptr, into.pages[:7], into.last)
    fill_entries(short, world.pages, world.segments, 1)
    assert into.pages[7:].tolist() == [-7, -7] and into.indptr.tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize(("heads", "list_heads", "dim"), [(4, 2, 32), (6, 6, 80)])
def test_states_of_entries_become_states_of_rows(heads: int, list_heads: int, dim: int) -> None:
    """A row has a state per split; some of them, and for one row all, belong to empty lists and hold nonsense."""
    world = make_world([20, 5, 9], heads, 2, dim, dtype=torch.float16)
    rows = [1, 7, 16, 17, 23]
    shape = (4, list_heads, 3, world.block, heads // list_heads)
    out, lse = torch.randn(*shape, dim, device=DEVICE).half(), 3 * torch.randn(shape, device=DEVICE)
    void = torch.rand(shape, device=DEVICE) < 0.3
    void[2, :, :, 1] = True
    out[void], lse[void] = torch.nan, EMPTY
    planned = plan(world, rows)
    state, natural = merge_entries(out, lse, planned, world.block)
    assert state.dtype == natural.dtype == torch.float32
    for place, row in enumerate(rows):
        segment = row // world.block
        slot = sum(other // world.block == segment for other in rows[:place])
        for head in range(heads):
            at = (segment, head // shape[-1], slice(None), slot, head % shape[-1])
            parts = [(o.float(), x * math.log(2)) for o, x in zip(out[at], lse[at], strict=True) if x > EMPTY]
            want = (torch.zeros(dim, device=DEVICE), torch.tensor(-torch.inf, device=DEVICE))
            for part in parts:
                want = tuple(x[0] for x in ref.merge_states(*(x[None] for x in (*want, *part))))
            torch.testing.assert_close(state[place, head], want[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(natural[place, head], want[1], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    world = make_world([20, 30])
    into = nothing_filled(8, 20)
    where = (world.pages, world.segments)
    with pytest.raises(ValueError, match="entries: found room for 8, allowed: 3 for each of at least 4 lists"):
        fill_entries(into, *where, 3)
    rowwise = Lists(world.segments.table, world.segments.table, 2, 16, world.segments.table == 0, 16, per_row=True)
    with pytest.raises(ValueError, match="lists: found lists per row, allowed: lists per segment"):
        fill_entries(into, *where, 1, rowwise)
    with pytest.raises(ValueError, match="granule: found 32, allowed: divisors of the page size 16"):
        fill_entries(into, *where, 1, lists_of([[0]] * 4, 2, 32, [False] * 2, 32))
    out = torch.zeros(1, 2, 1, 8, 2, 32, device=DEVICE)
    with pytest.raises(ValueError, match="out: found 1 segments, 8 slots"):
        merge_entries(out, out[..., 0].contiguous(), plan(world, [0]), world.block)
