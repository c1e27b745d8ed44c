"""Storing in C++ for every pair of dtypes: pages and bounds with the bits of the reference, moments to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.native.layout import Pages
from losa_kernels.native.store import store
from losa_kernels.reference import paging
from tests.kernels.native import each_level, require_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [(False, False), (True, False), (False, True), (True, True)]


def empty_pages(dtype: torch.dtype, page: int = 8, dim: int = 20, bounds: bool = True, moments: bool = True) -> Pages:
    shape, summary = (12, 3, page, dim), (12, 3, 2, dim)
    k, v = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    kept = (torch.zeros(summary, dtype=dtype) if bounds else None, torch.zeros(summary) if moments else None)
    return Pages(k, v, *kept)


def reference_store(pages: Pages, k: Tensor, v: Tensor, locations: Tensor) -> None:
    paging.store_rows(pages.k, k, locations)
    paging.store_rows(pages.v, v, locations)
    touched, filled = paging.touched_pages(locations, pages.page_size)
    if pages.bounds is not None:
        pages.bounds[touched] = paging.key_bounds(pages.k[touched], filled)
    if pages.moments is not None:
        pages.moments[touched] = paging.key_moments(pages.k[touched], filled)


def same(a: Pages, b: Pages, exactly: bool = False) -> bool:
    """Equal bits, in the moments only if `exactly`: sums of the reference may be rounded in another order."""
    pairs = [(a.k, b.k), (a.v, b.v), (a.bounds, b.bounds)]
    if exactly or a.moments is None or b.moments is None:
        pairs.append((a.moments, b.moments))
    else:
        torch.testing.assert_close(a.moments, b.moments, rtol=2e-6, atol=1e-5)
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


@each_level
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_and_summaries_are_those_of_the_reference(level: str, dtype: torch.dtype, source: torch.dtype) -> None:
    """Rows of three requests, one filling a page in two goes, one in mid-page, in an order that visits a page twice."""
    kernels = require_native(level)
    for bounds, moments in KINDS:
        mine, other = (empty_pages(dtype, bounds=bounds, moments=moments) for _ in range(2))
        for locations in ([40, 41, 42, 43], [44, 45, 0, 1, 2, 3, 4, 5, 6, 7, 80, 81, 46, 47, 82]):
            where = torch.tensor(locations)
            k, v = (torch.randn(len(locations), 3, 20) * 100).to(source), torch.randn(len(locations), 3, 20).to(source)
            store(kernels, mine, k, v, where)
            reference_store(other, k, v, where)
            assert same(mine, other)


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page", "dim"), [(1, 5), (16, 128), (64, 72), (256, 16)])
def test_moments_of_pages_of_every_size(level: str, dtype: torch.dtype, page: int, dim: int) -> None:
    """Against sums in double precision; channels far from zero and close together must not cancel."""
    kernels, pages = require_native(level), empty_pages(dtype, page, dim)
    count = 3 * page + page // 2
    k = torch.randn(count, 3, dim) + torch.arange(dim) * 8.0
    store(kernels, pages, k, k, torch.arange(count))
    assert pages.moments is not None
    for at in range(0, count, page):
        exact = pages.k[at // page, :, : min(page, count - at)].double()
        mean, spread = pages.moments[at // page].double().unbind(1)
        torch.testing.assert_close(mean, exact.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(spread, exact.var(1, correction=0), rtol=1e-4, atol=1e-7)


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_page_filled_block_by_block_has_the_bits_of_one_filled_at_once(level: str, dtype: torch.dtype) -> None:
    """And those that every other level computes."""
    kernels, k = require_native(level), torch.randn(16, 3, 20)
    pages = [empty_pages(dtype, 16) for _ in range(3)]
    for start in range(0, 16, 4):
        part = slice(start, start + 4)
        store(kernels, pages[0], k[part], k[part], torch.arange(start, start + 4))
    store(kernels, pages[1], k, k, torch.arange(16))
    store(require_native("portable"), pages[2], k, k, torch.arange(16))
    assert same(pages[0], pages[1], exactly=True) and same(pages[1], pages[2], exactly=True)


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
    assert pages.moments is not None
    torch.testing.assert_close(pages.moments[0], torch.stack((k.mean(0), k.var(0, correction=0)), 1))


@each_level
def test_a_pool_without_summaries_and_two_threads(level: str) -> None:
    kernels, mine, other = require_native(level), empty_pages(torch.bfloat16), empty_pages(torch.bfloat16)
    where, before = torch.randperm(96)[:60].sort().values, torch.get_num_threads()
    k, v = torch.randn(2, 60, 3, 20)
    torch.set_num_threads(2)
    store(kernels, mine, k, v, where)
    torch.set_num_threads(before)
    reference_store(other, k, v, where)
    bare = empty_pages(torch.bfloat16, bounds=False, moments=False)
    store(kernels, bare, k, v, where)
    # Rows of a page behind a gap were never stored; the bounds are compared where a request fills from the front.
    assert torch.equal(mine.k, other.k) and torch.equal(mine.v, other.v) and torch.equal(bare.k, other.k)
    assert same(mine, other)
