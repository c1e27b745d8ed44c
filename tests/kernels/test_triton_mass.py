"""The Triton mass of prefix granules against the reference: granules of every size, mean and maximum over rows."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from losa_kernels.reference.selection import key_mass
from losa_kernels.triton.mass import prefix_mass
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, make_world


def check(world: World, granule: int, over_rows: Literal["mean", "max"], tolerance: float = 1e-5) -> None:
    lse = torch.randn(world.q.shape[:2], device=DEVICE) + 4.0
    lse[1], lse[2, 0] = -torch.inf, -torch.inf
    got = prefix_mass(world.q, lse, world.pages, world.segments, world.scale, granule, over_rows)
    assert got.shape == (len(world.lengths), world.q.shape[1], -(-max(world.lengths) // granule))
    for index, length in enumerate(world.lengths):
        rows = world.rows(index)
        want = key_mass(world.q[rows], lse[rows], world.keys(index)[0], world.scale, granule, over_rows)
        torch.testing.assert_close(got[index, :, : want.shape[1]], want, rtol=tolerance, atol=tolerance / 10)
        assert not got[index, :, -(-length // granule) :].any()


@pytest.mark.parametrize("over_rows", ["mean", "max"])
@pytest.mark.parametrize("granule", [1, 16, 5, 64, 100, 128])
def test_granules_of_every_size(granule: int, over_rows: Literal["mean", "max"]) -> None:
    check(make_world([70, 1, 230, 0], heads=2, kv_heads=1), granule, over_rows)


@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "dim", "page"),
    [(4, 1, 1, 32, 16), (4, 5, 1, 64, 3), (16, 8, 2, 32, 16), (32, 6, 1, 80, 64), (5, 3, 3, 128, 8)],
)
def test_rows_and_heads_of_every_kind(block: int, heads: int, kv_heads: int, dim: int, page: int) -> None:
    check(make_world([40, 70], heads, kv_heads, dim, page, block), 4, "mean")


def test_half_precision() -> None:
    check(make_world([70], dtype=torch.float16), 16, "mean", tolerance=1e-3)


def test_the_masses_of_a_row_sum_to_one() -> None:
    world = make_world([90], heads=2, kv_heads=1, block=4)
    lse = world.whole(0, world.q)[1]
    mass = prefix_mass(world.q, lse, world.pages, world.segments, world.scale)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2, device=DEVICE))


def test_the_same_bits_alone_and_in_company() -> None:
    world = make_world([30, 200], heads=4, kv_heads=1, block=4)
    lse = torch.randn(8, 4, device=DEVICE)
    together = prefix_mass(world.q, lse, world.pages, world.segments, world.scale, 8)
    alone = world.alone(0)
    one = prefix_mass(alone.q, lse[:4], alone.pages, alone.segments, alone.scale, 8)
    assert torch.equal(one[0], together[0, :, : one.shape[2]])


def test_what_does_not_fit_is_refused() -> None:
    world = make_world([30])
    with pytest.raises(ValueError, match="granule: found 0, allowed: at least 1"):
        prefix_mass(world.q, torch.zeros(8, 4, device=DEVICE), world.pages, world.segments, world.scale, 0)
    with pytest.raises(ValueError, match="lse: found shape"):
        prefix_mass(world.q, torch.zeros(8, 2, device=DEVICE), world.pages, world.segments, world.scale)
