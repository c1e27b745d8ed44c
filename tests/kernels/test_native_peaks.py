"""The largest score per page that the C++ prefix attention reports beside its result, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.native import attention
from losa_kernels.native.attention import Lists
from losa_kernels.reference import selection as ref
from losa_kernels.reference.paging import gather_pages
from tests.kernels.native import World, each_level, make_world, require_native

RAGGED = [0, 1, 16, 53, 200, 1500]


def expected(world: World, whole: list[bool], rows: Tensor | None, width: int) -> Tensor:
    """The reference for the segments that are read whole, -inf for everything else."""
    count = world.q.shape[0] if rows is None else rows.shape[0]
    peaks = torch.full((count, world.q.shape[1], width), -torch.inf)
    page = world.pages.page_size
    for index, (table, length) in enumerate(zip(world.tables, world.lengths, strict=True)):
        place, mine = world.rows(index, rows)
        if whole[index] and length and len(place):
            keys = gather_pages(world.pages.k, table)[:, :length]
            found = ref.page_peaks(world.q[mine], keys, world.scale, page)
            peaks[place, :, : found.shape[-1]] = found
    return peaks


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page", "heads"), [(1, 4), (4, 2), (16, 4), (16, 16), (64, 4), (128, 4), (1024, 4)])
def test_peaks_of_whole_prefixes(level: str, dtype: torch.dtype, page: int, heads: int) -> None:
    """Pages smaller, as large as and larger than a tile; more folded rows than one work item holds."""
    world = make_world(RAGGED, heads=heads, dim=32, page=page, block=8, dtype=dtype)
    width = -(-max(RAGGED) // page) + 2
    peaks = torch.full((world.q.shape[0], heads, width), torch.nan)
    kernels = require_native(level)
    out, lse = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, peaks=peaks)
    torch.testing.assert_close(peaks, expected(world, [True] * len(RAGGED), None, width), rtol=1e-5, atol=1e-5)
    plain = attention.prefix(kernels, world.pages, world.segments, world.q, world.scale)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])


@each_level
def test_only_rows_that_read_everything_have_peaks(level: str) -> None:
    world = make_world([48, 80, 33], dim=16, page=16, block=4)
    rows = torch.tensor([0, 3, 4, 5, 10])
    whole = [True, False, True]
    lists = Lists(torch.tensor([0, 0, 0, 2, 3, 3, 3]), torch.tensor([0, 4, 1]), 2, whole, 16)
    peaks = torch.empty(5, world.q.shape[1], 3)
    attention.prefix(require_native(level), world.pages, world.segments, world.q, world.scale, rows, lists, peaks)
    torch.testing.assert_close(peaks, expected(world, whole, rows, 3), rtol=1e-5, atol=1e-5)
    assert bool((peaks[2:4] == -torch.inf).all()) and bool(peaks[0].isfinite().all())


def test_too_little_room_and_odd_pages_are_refused() -> None:
    kernels = require_native()
    for page, width, message in ((16, 2, "found room for 2 pages, needed: 3"), (24, 9, "allowed: page sizes")):
        world = make_world([48], dim=16, page=page, block=4)
        peaks = torch.empty(4, world.q.shape[1], width)
        with pytest.raises(ValueError, match=message):
            attention.prefix(kernels, world.pages, world.segments, world.q, world.scale, peaks=peaks)
