"""The C++ mass of granules against the reference: sizes, dtypes, granules that cross pages and tiles, odd numbers."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from losa_kernels.native import attention
from losa_kernels.native.mass import prefix_mass
from losa_kernels.reference import selection as ref
from losa_kernels.reference.paging import gather_pages
from tests.kernels.native import World, each_level, make_world, require_native

Over = Literal["mean", "max"]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RAGGED = [0, 1, 16, 53, 200]  # nothing, one position, one page, partial last pages
each_over = pytest.mark.parametrize("over", ["mean", "max"])


def lse_of(world: World, level: str) -> Tensor:
    """That of the whole prefixes, so that each row's mass adds up to one."""
    return attention.prefix(require_native(level), world.pages, world.segments, world.q, world.scale)[1]


def expected(world: World, lse_RH: Tensor, granule: int, over: Over) -> Tensor:
    """The reference, segment by segment; 0 behind its last granule."""
    heads, longest = world.q.shape[1], max(world.lengths)
    mass = torch.zeros(len(world.lengths), heads, -(-longest // granule))
    for index, (table, length) in enumerate(zip(world.tables, world.lengths, strict=True)):
        mine = slice(index * world.block, (index + 1) * world.block)
        keys = gather_pages(world.pages.k, table)[:, :length]
        found = ref.key_mass(world.q[mine], lse_RH[mine], keys, world.scale, granule, over)
        mass[index, :, : found.shape[1]] = found
    return mass


def check(level: str, world: World, lse_RH: Tensor, granule: int, over: Over) -> Tensor:
    got = prefix_mass(require_native(level), world.pages, world.segments, world.q, lse_RH, world.scale, granule, over)
    torch.testing.assert_close(got, expected(world, lse_RH, granule, over), rtol=2e-5, atol=1e-7)
    return got


@each_level
@each_over
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 100, 128, 256])
def test_ragged_prefixes_of_every_head_dim(level: str, over: Over, dim: int, dtype: torch.dtype) -> None:
    world = make_world(RAGGED, dim=dim, dtype=dtype)
    mass = check(level, world, lse_of(world, level), 16, over)
    assert not mass[0].any()
    if over == "mean":
        torch.testing.assert_close(mass[1:].sum(-1), torch.ones(4, 4))


@each_level
@each_over
@pytest.mark.parametrize("page", [3, 16, 64])
@pytest.mark.parametrize("granule", [1, 5, 16, 48, 64, 100, 600, 5000])
def test_granules_that_cross_pages_tiles_and_tasks(level: str, over: Over, page: int, granule: int) -> None:
    world = make_world([1500, 1024, 70, 0], dim=16, page=page, block=4)
    check(level, world, lse_of(world, level), granule, over)


@each_level
@each_over
@pytest.mark.parametrize("block", [1, 4, 16, 32])
@pytest.mark.parametrize("share", [1, 2, 5, 8, 70])
def test_rows_of_every_block_length_and_group(level: str, over: Over, block: int, share: int) -> None:
    """Up to 2,240 folded rows: the maximum is taken over all of them, and the mean divides by the rows."""
    world = make_world([40, 0, 130], heads=2 * share, block=block)
    check(level, world, lse_of(world, level), 16, over)


@each_level
@each_over
def test_mass_relative_to_any_lse(level: str, over: Over) -> None:
    """Also far above one and far below; rows that read nothing have none."""
    world = make_world([700, 90], dim=16)
    lse = lse_of(world, level) + torch.linspace(-60.0, 60.0, 64).view(16, 4)
    lse[3], lse[9] = -torch.inf, torch.inf
    assert bool((check(level, world, lse, 16, over) > 1e20).any())
    nothing = torch.full_like(lse, -torch.inf)
    assert not check(level, world, nothing, 16, over).any()


@each_level
@each_over
def test_overflow_is_infinite(level: str, over: Over) -> None:
    world = make_world([40])
    world.q[2] *= 1e4
    kernels, lse = require_native(level), torch.zeros(8, 4)
    mass = prefix_mass(kernels, world.pages, world.segments, world.q, lse, world.scale, 1, over)
    assert torch.equal(mass.isinf(), expected(world, lse, 1, over).isinf()) and bool(mass.isinf().any())


@each_level
@each_over
def test_a_stored_nan_is_not_hidden(level: str, over: Over) -> None:
    world = make_world([100, 40], dim=16)
    lse = lse_of(world, level)
    world.pages.k[world.tables[0][2], 0, 3] = torch.nan
    kernels = require_native(level)
    mass = prefix_mass(kernels, world.pages, world.segments, world.q, lse, world.scale, 16, over)
    poisoned = torch.zeros_like(mass, dtype=torch.bool)
    poisoned[0, :2, 2] = True  # the query heads of KV head 0
    assert torch.equal(mass.isnan(), poisoned)


@each_level
@each_over
@pytest.mark.parametrize("granule", [16, 7, 3000])
def test_the_same_bits_alone_in_company_and_with_two_threads(level: str, over: Over, granule: int) -> None:
    kernels, world = require_native(level), make_world([2500, 0, 1030, 77, 5000], dim=24)
    lse, before = lse_of(world, level), torch.get_num_threads()

    def run(one: World, lse_RH: Tensor) -> Tensor:
        return prefix_mass(kernels, one.pages, one.segments, one.q, lse_RH, one.scale, granule, over)

    single = run(world, lse)
    torch.set_num_threads(2)
    both = run(world, lse)
    torch.set_num_threads(before)
    assert torch.equal(single, both)
    for index in range(5):
        mine = slice(index * world.block, (index + 1) * world.block)
        alone = run(world.alone(index), lse[mine].contiguous())
        assert torch.equal(single[index, :, : alone.shape[2]], alone[0])
        assert not single[index, :, alone.shape[2] :].any()


@each_level
def test_empty_prefixes_have_no_granules(level: str) -> None:
    world = make_world([0, 0])
    lse = torch.full((16, 4), -torch.inf)
    kernels = require_native(level)
    mass = prefix_mass(kernels, world.pages, world.segments, world.q, lse, world.scale, 16)
    assert mass.shape == (2, 4, 0)
