"""Storing in C++: the same bits in the pages and their bounds as the reference, for every pair of dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.native.layout import Pages
from losa_kernels.native.store import store
from losa_kernels.reference import paging
from tests.kernels.native import each_level, require_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def empty_pages(dtype: torch.dtype, page: int = 8, dim: int = 20, bounds: bool = True) -> Pages:
    shape = (12, 3, page, dim)
    k, v = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    return Pages(k, v, torch.zeros(12, 3, 2, dim, dtype=dtype) if bounds else None)


def reference_store(pages: Pages, k: Tensor, v: Tensor, locations: Tensor) -> None:
    paging.store_rows(pages.k, k, locations)
    paging.store_rows(pages.v, v, locations)
    if pages.bounds is not None:
        touched, filled = paging.touched_pages(locations, pages.page_size)
        pages.bounds[touched] = paging.key_bounds(pages.k[touched], filled)


def same(a: Pages, b: Pages) -> bool:
    pairs = ((a.k, b.k), (a.v, b.v), (a.bounds, b.bounds))
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


@each_level
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_and_bounds_are_those_of_the_reference(level: str, dtype: torch.dtype, source: torch.dtype) -> None:
    """Rows of three requests, one filling a page in two goes, one in mid-page, in an order that visits a page twice."""
    kernels, mine, other = require_native(level), empty_pages(dtype), empty_pages(dtype)
    for locations in ([40, 41, 42, 43], [44, 45, 0, 1, 2, 3, 4, 5, 6, 7, 80, 81, 46, 47, 82]):
        where = torch.tensor(locations)
        k, v = (torch.randn(len(locations), 3, 20) * 100).to(source), torch.randn(len(locations), 3, 20).to(source)
        store(kernels, mine, k, v, where)
        reference_store(other, k, v, where)
        assert same(mine, other)


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_torch(level: str, dtype: torch.dtype) -> None:
    """Every rounding case: ties, subnormals, overflow, infinities, both zeros."""
    kernels = require_native(level)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = [0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 3e-8, 6.1e-5, -6.09e-5, 1e-40]
    values = torch.cat((torch.tensor(special), bits[~bits.isnan()], torch.randn(4096) * 1e-6, torch.randn(4096)))
    values = values[: len(values) // 60 * 60].view(-1, 3, 20)
    pages = -(-len(values) // 8)
    k, v = (torch.zeros(pages, 3, 8, 20, dtype=dtype) for _ in range(2))
    where = torch.arange(len(values))
    store(kernels, Pages(k, v), values, -values, where)
    for cache, want in ((k, values), (v, -values)):
        got = cache[where // 8, :, where % 8]
        assert torch.equal(got.float(), want.to(dtype).float())
    nan = torch.full((1, 3, 20), torch.nan)
    store(kernels, Pages(k, v), nan, nan, where[:1])
    assert bool(k[0, :, 0].isnan().all())


@each_level
def test_a_page_with_an_earlier_owner_shows_only_the_new_one(level: str) -> None:
    kernels, pages = require_native(level), empty_pages(torch.float32)
    loud, k = torch.full((8, 3, 20), 50.0), torch.randn(4, 3, 20)
    store(kernels, pages, loud, loud, torch.arange(8))
    store(kernels, pages, k, k, torch.arange(4))
    assert pages.bounds is not None
    assert torch.equal(pages.bounds[0, :, 0], k.amax(0)) and torch.equal(pages.bounds[0, :, 1], k.amin(0))


@each_level
def test_a_pool_without_bounds_and_two_threads(level: str) -> None:
    kernels, mine, other = require_native(level), empty_pages(torch.bfloat16), empty_pages(torch.bfloat16)
    where, before = torch.randperm(96)[:60].sort().values, torch.get_num_threads()
    k, v = torch.randn(2, 60, 3, 20)
    torch.set_num_threads(2)
    store(kernels, mine, k, v, where)
    torch.set_num_threads(before)
    reference_store(other, k, v, where)
    bare = empty_pages(torch.bfloat16, bounds=False)
    store(kernels, bare, k, v, where)
    # Rows of a page behind a gap were never stored; the bounds are compared where a request fills from the front.
    assert torch.equal(mine.k, other.k) and torch.equal(mine.v, other.v) and torch.equal(bare.k, other.k)
    assert same(mine, other)
