"""The C++ attention against the reference: sizes, dtypes, ragged lengths, lists, and the same bits for everybody."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from losa_kernels.native import attention
from losa_kernels.reference import attention as ref
from tests.kernels.native import World, each_level, make_world, require_native, segments_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RAGGED = [0, 1, 16, 53, 200]  # nothing, one position, one page, partial last pages


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@each_level
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 100, 128, 256])
def test_whole_prefixes_of_every_head_dim(level: str, dim: int, dtype: torch.dtype) -> None:
    """Pages are compared as they were rounded, so 16-bit ones owe no less than float32."""
    kernels, world = require_native(level), make_world(RAGGED, dim=dim, dtype=dtype)
    out, lse = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale)
    for index in range(len(RAGGED)):
        place, rows = world.rows(index)
        close((out[place], lse[place]), world.prefix(index, world.q[rows]))
    assert not out[: world.block].any() and bool((lse[: world.block] == -torch.inf).all())


@each_level
@pytest.mark.parametrize("block", [4, 16, 32])
@pytest.mark.parametrize("share", [1, 2, 5, 8, 70])
def test_rows_of_every_block_length_and_group(level: str, block: int, share: int) -> None:
    kernels, world = require_native(level), make_world([40, 0, 130], heads=2 * share, block=block)
    rows = torch.tensor([0, block - 1, 2 * block - 1, 2 * block, 2 * block + 2])
    out, lse = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, rows)
    for index in range(3):
        place, mine = world.rows(index, rows)
        close((out[place], lse[place]), world.prefix(index, world.q[mine]))


@each_level
@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_long_prefixes_are_added_up_from_chunks(level: str, page: int) -> None:
    kernels, world = require_native(level), make_world([3000, 1024, 1025], kv_heads=1, page=page, dim=16)
    out, lse = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale)
    for index in range(3):
        place, rows = world.rows(index)
        close((out[place], lse[place]), world.prefix(index, world.q[rows]))


def listed(world: World, owner_segment: list[int], heads: int, granule: int, whole: list[bool]) -> Tensor:
    """A random choice of granules: bool [owners, heads, granules], nothing for whole segments."""
    most = -(-max(world.lengths) // granule)
    chosen = torch.rand(len(owner_segment), heads, most) < 0.4
    for owner, segment in enumerate(owner_segment):
        chosen[owner, :, -(-world.lengths[segment] // granule) :] = False
        chosen[owner] &= not whole[segment]
    return chosen


@each_level
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("granule", [1, 5, 16, 32])
def test_lists_and_whole_prefixes_in_one_call(level: str, granule: int, heads: int, per_row: bool) -> None:
    kernels, world = require_native(level), make_world([53, 200, 0, 96, 1500])
    rows = torch.tensor([0, 3, 9, 10, 15, 17, 25, 33, 39])
    whole = [False, False, False, True, False]
    owners = (rows // world.block).tolist() if per_row else list(range(5))
    chosen = listed(world, owners, heads, granule, whole)
    chosen[-1, -1] = False  # one list of a long prefix is empty
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), chosen.sum(-1).flatten().cumsum(0)))
    lists = attention.Lists(ends, chosen.nonzero()[:, -1].contiguous(), heads, whole, granule, per_row)
    out, lse = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, rows, lists)
    for place, row in enumerate(rows.tolist()):
        segment = row // world.block
        table, length = world.tables[segment], world.lengths[segment]
        for head in range(4):
            mask = chosen[place if per_row else segment, head * heads // 4].repeat_interleave(granule)[:length]
            positions = torch.arange(length) if whole[segment] else mask.nonzero().flatten()
            at = (table[positions // 16], head // 2, positions % 16)
            k, v = world.pages.k[at], world.pages.v[at]
            want = ref.attend(world.q[row, head][None], k, v, world.scale)
            close((out[place, head][None], lse[place, head][None]), want)


@each_level
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("block", "share"), [(4, 1), (8, 2), (32, 8), (5, 3)])
def test_prefill_of_ragged_segments(level: str, dtype: torch.dtype, block: int, share: int) -> None:
    kernels = require_native(level)
    starts, counts = [0, 3 * block, 0, 41 * block], [block, 7 * block, 30 * block, block]
    ends = [a + b for a, b in zip(starts, counts, strict=True)]
    world = make_world(ends, heads=2 * share, dim=48, block=block, dtype=dtype)
    segments = segments_of(world.tables, starts, block)
    q = torch.randn(sum(counts), 2 * share, 48)
    out = attention.prefill(kernels, world.pages, segments, q, torch.tensor(counts), world.scale)
    for mine, got, table, start in zip(q.split(counts), out.split(counts), world.tables, starts, strict=True):
        want = ref.block_causal_attention(mine, world.pages.k, world.pages.v, table, start, block, world.scale)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@each_level
def test_prefill_is_the_same_bits_however_it_is_cut(level: str) -> None:
    kernels, block, total = require_native(level), 4, 1200
    world = make_world([total], block=block, dim=32)
    q = torch.randn(total, 4, 32)

    def run(start: int, stop: int) -> Tensor:
        segments = segments_of(world.tables, [start], block)
        return attention.prefill(
            kernels, world.pages, segments, q[start:stop], torch.tensor([stop - start]), world.scale
        )

    whole = run(0, total)
    for cuts in ([0, 4, 1200], [0, 500, 504, 1036, 1200], list(range(0, 1201, 40))):
        assert torch.equal(torch.cat([run(a, b) for a, b in pairwise(cuts)]), whole)


@each_level
@pytest.mark.parametrize("block", [1, 4, 16, 32, 70])
@pytest.mark.parametrize("share", [1, 4])
def test_blocks_alone_and_merged_with_their_prefix(level: str, block: int, share: int) -> None:
    kernels, dim, groups, segments = require_native(level), 40, 3, 3
    q = torch.randn(segments * block, groups * share, dim)
    k, v = torch.randn(2, segments * block, groups, dim)
    shaped = (x.view(segments, block, -1, dim) for x in (q, k, v))
    want = tuple(x.flatten(0, 1) for x in ref.block_attention(*shaped, dim**-0.5))
    got = attention.block(kernels, q, k, v, block, dim**-0.5)
    close(got, (want[0], want[1]))
    state = torch.randn_like(q), torch.randn(q.shape[:2])
    state[1][::2] = -torch.inf  # some rows read nothing of their prefix
    state[0][::2] = 0.0
    merged, _ = ref.merge_states(*state, *want)
    finished = attention.finish_block(kernels, q, k, v, block, dim**-0.5, attention.Kept(*state))
    torch.testing.assert_close(finished, merged, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(attention.merge(kernels, state, got), merged, rtol=1e-5, atol=2e-6)


@each_level
def test_merging_two_empty_parts_is_empty(level: str) -> None:
    kernels = require_native(level)
    empty = torch.zeros(3, 2, 8), torch.full((3, 2), -torch.inf)
    full = torch.randn(3, 2, 8), torch.randn(3, 2)
    assert not attention.merge(kernels, empty, empty).any()
    torch.testing.assert_close(attention.merge(kernels, empty, full), full[0])
    torch.testing.assert_close(attention.merge(kernels, full, empty), full[0])


@each_level
def test_extreme_scores_stay_finite_and_right(level: str) -> None:
    """Weights far below and far above the first tile's: the running maximum has to move."""
    kernels, world = require_native(level), make_world([700], dim=16)
    for size in (0.0, 30.0, 200.0):
        out, lse = attention.prefix(kernels, world.pages, world.segments, world.q * size, world.scale)
        want = world.prefix(0, world.q * size)
        torch.testing.assert_close((out, lse), want, rtol=1e-5, atol=1e-5 * max(size, 1.0))


@each_level
@pytest.mark.parametrize("poison", ["k", "v"])
def test_a_stored_nan_is_not_hidden(level: str, poison: str) -> None:
    kernels, world = require_native(level), make_world([100, 40])
    getattr(world.pages, poison)[world.tables[0][2], 0, 3] = torch.nan
    out, _ = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale)
    assert bool(out[: world.block, :2].isnan().all())  # the query heads of KV head 0
    assert bool(out[: world.block, 2:].isfinite().all() and out[world.block :].isfinite().all())


@each_level
def test_the_same_bits_alone_in_company_and_with_two_threads(level: str, two_threads: None) -> None:
    kernels, world = require_native(level), make_world([2500, 0, 1030, 77, 5000], dim=24)
    rows = torch.tensor([0, 1, 5, 9, 17, 18, 24, 31, 33, 39])
    both = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, rows)
    torch.set_num_threads(1)
    single = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, rows)
    assert all(torch.equal(a, b) for a, b in zip(both, single, strict=True))
    for index in range(5):
        place, mine = world.rows(index, rows)
        alone, local = world.alone(index), mine - index * world.block
        got = attention.prefix(kernels, alone.pages, alone.segments, alone.q, world.scale, local)
        assert torch.equal(got[0], both[0][place]) and torch.equal(got[1], both[1][place])
        for row in range(len(local)):  # nor does a row depend on the other rows of its block
            one = attention.prefix(kernels, alone.pages, alone.segments, alone.q, world.scale, local[row : row + 1])
            assert torch.equal(one[0][0], got[0][row])


@each_level
def test_no_rows_at_all(level: str) -> None:
    kernels, world = require_native(level), make_world([20, 30])
    none = torch.empty(0, dtype=torch.int64)
    out, lse = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, none)
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)
