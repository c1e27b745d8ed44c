"""The Triton attention over prefixes against the reference: whole, listed, ragged, with peaks, alone and in company."""

from __future__ import annotations

import pytest
import torch

from losa_kernels.reference import attention as ref
from losa_kernels.reference import selection
from losa_kernels.triton.layout import Lists, Pages, Parts, Planned
from losa_kernels.triton.merge import merge_parts, merge_states
from losa_kernels.triton.prefix import MAX_KEYS, attend_prefix, filling_chunk
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import State, World, lists_of, make_world, plan

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
RAGGED = [0, 1, 16, 53]  # nothing, one position, one page, a partial last page


def close(got: State, want: State, dtype: torch.dtype = F32) -> None:
    # Weights are rounded to the dtype of the queries before they meet the values.
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == F32 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(got, want, **tolerance)  # type: ignore[arg-type]


def attend(
    world: World,
    planned: Planned | None = None,
    lists: Lists | None = None,
    chunk: int = MAX_KEYS,
    peaks: torch.Tensor | None = None,
) -> State:
    rows = Planned.every(world.segments) if planned is None else planned
    return merge_parts(
        attend_prefix(world.q, rows, world.pages, world.segments, world.scale, lists, chunk, peaks), rows
    )


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_whole_prefixes_of_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    world = make_world(RAGGED, dim=dim, dtype=dtype)
    out, lse = attend(world)
    for index in range(len(RAGGED)):
        rows = world.rows(index)
        close((out[rows], lse[rows]), world.whole(index, world.q[rows]), dtype)
    assert not out[: world.block].any() and bool((lse[: world.block] == -torch.inf).all())


def test_pages_of_another_dtype() -> None:
    world = make_world([40], kv_dtype=BF16)
    close(attend(world), world.whole(0, world.q))


@pytest.mark.parametrize(("block", "share"), [(4, 1), (4, 2), (4, 3), (4, 5), (8, 8), (16, 4), (32, 1), (32, 6)])
def test_planned_rows_of_every_block_length_and_group(block: int, share: int) -> None:
    """One segment has no planned row; 32 rows of 6 heads take two tiles, of which one segment fills only the first."""
    world = make_world([40, 0, 19, 33], heads=share, kv_heads=1, block=block)
    rows = [0, 1, block - 1, 2 * block - 1, *range(3 * block, 4 * block)]
    out, lse = attend(world, plan(world, rows))
    for index in (0, 1, 3):
        mine = world.rows(index, torch.tensor(rows, device=DEVICE))
        place = [rows.index(row) for row in mine.tolist()]
        close((out[place], lse[place]), world.whole(index, world.q[mine]))


@pytest.mark.parametrize("page", [1, 3, 64])
def test_long_prefixes_are_added_up_from_splits(page: int) -> None:
    world = make_world([300, MAX_KEYS, MAX_KEYS + 1], heads=2, kv_heads=1, page=page)
    out, lse = attend(world)
    for index in range(3):
        rows = world.rows(index)
        close((out[rows], lse[rows]), world.whole(index, world.q[rows]))


@pytest.mark.parametrize(("granule", "page"), [(1, 16), (16, 16), (4, 16), (32, 8), (5, 3)])
@pytest.mark.parametrize("by", ["KV head", "query head"])
def test_lists_of_segments(granule: int, page: int, by: str) -> None:
    """Own lists per head, empty ones among them; the last granule is partial; one segment reads everything."""
    world = make_world([70, 33, 0, 20], page=page)
    heads = 2 if by == "KV head" else 4
    last = 69 // granule
    first = [[0, last], [], [last - 1], [last - 2, last]][:heads]
    second = [[0], [1, 2], [0, 1, 2], []][:heads]
    lists = lists_of(first + second + [[]] * (2 * heads), heads, granule, [False, False, False, True], 70)
    rows = [0, 3, 7, 9, 17, 24, 31]
    out, lse = attend(world, plan(world, rows), lists)
    for index, mine in ((0, [0, 1, 2]), (1, [3]), (2, [4]), (3, [5, 6])):
        q = world.q[[rows[place] for place in mine]]
        chosen = {0: first, 1: second}.get(index, [[]] * heads)
        want = world.whole(index, q) if index == 3 else world.listed(index, q, chosen, granule)
        close((out[mine], lse[mine]), want)


@pytest.mark.parametrize("by", ["KV head", "query head"])
def test_lists_of_rows(by: str) -> None:
    world = make_world([90, 0, 60], heads=6, block=4)
    heads, rows = (2 if by == "KV head" else 6), [0, 2, 3, 8, 11]
    drawn = torch.rand(len(rows), heads, 6) < 0.4
    drawn[:, :, 4:] &= torch.tensor([True, True, True, False, False])[:, None, None]
    chosen = [one.nonzero().flatten().tolist() for one in drawn.flatten(0, 1)]
    unused = (len(world.q) - len(rows)) * heads
    lists = lists_of(chosen + [[]] * unused, heads, 16, [False, False, True], 90, per_row=True)
    out, lse = attend(world, plan(world, rows), lists)
    for place, row in enumerate(rows):
        mine = chosen[place * heads : (place + 1) * heads]
        q = world.q[row : row + 1]
        want = world.whole(2, q) if row >= 8 else world.listed(0, q, mine, 16)
        close((out[place : place + 1], lse[place : place + 1]), want)


def test_the_same_bits_alone_and_in_company() -> None:
    """Also beside a longer list, which brings more splits, and among other planned rows."""
    world = make_world([140, 300, 30], heads=4, kv_heads=1, block=4)
    chosen = [[1, 4, 8], list(range(18)), [0, 1]]
    rows = [1, 2, 4, 5, 7, 11]
    out, lse = attend(world, plan(world, rows), lists_of(chosen, 1, 16, [False] * 3, 300))
    for index, mine in ((0, [0, 1]), (1, [2, 3, 4]), (2, [5])):
        alone = world.alone(index)
        planned = plan(alone, [rows[place] - 4 * index for place in mine])
        most = 16 * len(chosen[index])
        got = attend(alone, planned, lists_of([chosen[index]], 1, 16, [False], most))
        assert torch.equal(got[0][: len(mine)], out[mine]) and torch.equal(got[1][: len(mine)], lse[mine])


@pytest.mark.parametrize("page", [4, 16, 64])
def test_peaks_where_a_whole_prefix_is_read(page: int) -> None:
    world = make_world([70, 40, 0], heads=4, kv_heads=1, block=4, page=page)
    rows = [0, 3, 5, 6, 9]
    width = -(-70 // page) + 1
    for lists in (None, lists_of([[], [0, 1], []], 1, 2, [True, False, True], 70)):
        peaks = torch.zeros(len(world.q), 4, width, device=DEVICE)
        attend(world, plan(world, rows), lists, peaks=peaks)
        want = torch.full((len(rows), 4, width), -torch.inf, device=DEVICE)
        for index, mine in ((0, [0, 1]), (1, [2, 3])):
            if index == 0 or lists is None:
                q = world.q[[rows[place] for place in mine]]
                found = selection.page_peaks(q, world.keys(index)[0], world.scale, page)
                want[mine, :, : found.shape[2]] = found
        torch.testing.assert_close(peaks[: len(rows)], want, rtol=1e-5, atol=2e-6)


def test_merging_two_states() -> None:
    out_a, out_b = (torch.randn(3, 7, 80, device=DEVICE) for _ in range(2))
    lse_a, lse_b = (torch.randn(3, 7, device=DEVICE) * 30 for _ in range(2))
    lse_a[0], lse_b[0, :4], lse_b[1] = -torch.inf, -torch.inf, -torch.inf
    want = ref.merge_states(out_a, lse_a, out_b, lse_b)
    close(merge_states(out_a, lse_a, out_b, lse_b), (want[0], want[1]))
    out_a[0], out_b[1] = torch.nan, torch.nan  # what an empty part holds means nothing
    got = merge_states(out_a, lse_a, out_b, lse_b)
    close((got[0][0, 4:], got[1][0, 4:]), (want[0][0, 4:], want[1][0, 4:]))
    close((got[0][1:], got[1][1:]), (want[0][1:], want[1][1:]))


def test_parts_without_keys_are_not_read() -> None:
    world = make_world([20], heads=2, kv_heads=1, block=4)
    planned = Planned.every(world.segments)
    out, lse = torch.randn(3, 4, 2, 32, device=DEVICE), torch.randn(3, 4, 2, device=DEVICE)
    lse[1:, 2:], out[1:, 2:] = -torch.inf, torch.nan
    lse[0, 3], out[0, 3] = -torch.inf, torch.nan
    got = merge_parts(Parts(out, lse), planned)
    assert torch.equal(got[1][2], lse[0, 2]) and bool((got[1][3] == -torch.inf).all()) and not got[0][3].any()
    torch.testing.assert_close(got[0][2], out[0, 2])
    both = ref.merge_states(*ref.merge_states(out[0, :2], lse[0, :2], out[1, :2], lse[1, :2]), out[2, :2], lse[2, :2])
    close((got[0][:2], got[1][:2]), both)


def test_a_chunk_fills_the_device() -> None:
    assert filling_chunk(8, 32768, 132) == 1024  # 33 splits of 8 programs for 132 processors
    assert filling_chunk(1000, 32768, 132) == 32768
    assert filling_chunk(1, 100, 132) == MAX_KEYS
    assert filling_chunk(8, 0, 132) == MAX_KEYS


@pytest.mark.parametrize("chunk", [0, 100, -128])
def test_a_chunk_that_is_no_multiple_is_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk: found {chunk}, allowed: multiples of 128"):
        attend(make_world([20]), chunk=chunk)


def test_what_does_not_fit_is_refused() -> None:
    world = make_world([20, 30])
    lists = lists_of([[0]] * 4, 2, 16, [False] * 2, 30)
    for wrong, message in [
        (lists._replace(heads=3), "heads of lists: found 3, allowed: 2, 4"),
        (lists._replace(granule=0), "granule: found 0"),
        (lists._replace(indptr=lists.indptr[1:].clone()), r"indptr of lists: found shape \[4\], allowed: \[5\]"),
        (lists._replace(indices=lists.indices.int()), "indices: found torch.int32, allowed: torch.int64"),
        (lists._replace(whole=lists.whole[:1].clone()), "whole: found shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(world, lists=wrong)
    with pytest.raises(ValueError, match="peaks: found room for 1 pages"):
        attend(world, peaks=torch.zeros(16, 4, 1, device=DEVICE))
    with pytest.raises(ValueError, match="page size 3, allowed: divisors of 128"):
        attend(make_world([20], page=3), peaks=torch.zeros(8, 4, 7, device=DEVICE))
    with pytest.raises(ValueError, match="head dim 300"):
        Pages(torch.zeros(1, 1, 1, 300), torch.zeros(1, 1, 1, 300))
    with pytest.raises(ValueError, match="strides"):
        Pages(world.pages.k.transpose(1, 2), world.pages.v.transpose(1, 2))
