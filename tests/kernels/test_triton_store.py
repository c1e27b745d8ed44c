"""The Triton store against the reference: rows in their places, summaries of the touched pages and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import paging
from losa_kernels.triton.layout import Pages
from losa_kernels.triton.store import store_rows
from tests.kernels.interpreter import DEVICE

POOL = 7


def empty_pages(
    kv_heads: int, page: int, dim: int, dtype: torch.dtype, bounds: bool = True, moments: bool = True
) -> Pages:
    """Pages of earlier users."""
    shape, summary = (POOL, kv_heads, page, dim), (POOL, kv_heads, 2, dim)
    k, v = ((torch.randn(shape, device=DEVICE) * 9).to(dtype) for _ in range(2))
    some, others = torch.randn(2, *summary, device=DEVICE)
    return Pages(k, v, some.to(dtype) if bounds else None, others if moments else None)


def copy(pages: Pages) -> Pages:
    kept = (None if x is None else x.clone() for x in (pages.bounds, pages.moments))
    return Pages(pages.k.clone(), pages.v.clone(), *kept)


def reference_store(pages: Pages, k: Tensor, v: Tensor, locations: Tensor) -> None:
    paging.store_rows(pages.k, k, locations)
    paging.store_rows(pages.v, v, locations)
    touched, filled = paging.touched_pages(locations, pages.k.shape[2])
    if pages.bounds is not None:
        pages.bounds[touched] = paging.key_bounds(pages.k[touched], filled)
    if pages.moments is not None:
        pages.moments[touched] = paging.key_moments(pages.k[touched], filled)


def check(got: Pages, want: Pages) -> None:
    """Equal bits, and moments to rounding: their sums are added in another order."""
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
    assert (got.bounds is None) == (want.bounds is None) and (got.moments is None) == (want.moments is None)
    if got.bounds is not None and want.bounds is not None:
        assert torch.equal(got.bounds, want.bounds)
    if got.moments is not None and want.moments is not None:
        torch.testing.assert_close(got.moments, want.moments, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "page", "dim"), [(2, 16, 32), (3, 4, 80), (1, 5, 128)])
@pytest.mark.parametrize(("bounds", "moments"), [(True, False), (False, True), (True, True)])
def test_rows_and_summaries(
    kv_heads: int, page: int, dim: int, dtype: torch.dtype, bounds: bool, moments: bool
) -> None:
    """Three requests: a page from its middle on, whole pages, the first rows of a page. Twice, with one scratch."""
    got = empty_pages(kv_heads, page, dim, dtype, bounds, moments)
    want = copy(got)
    filled = torch.zeros(POOL, dtype=torch.int32, device=DEVICE)
    places = [2 * page + page // 2, *range(4 * page, 6 * page), *range(page, page + 3)]
    for locations in (places, [2 * page + page // 2 + 1, page + 3]):
        at = torch.tensor(locations, device=DEVICE)
        k, v = (torch.randn(len(at), kv_heads, dim, device=DEVICE).to(torch.float32) for _ in range(2))
        if dtype == torch.bfloat16:  # the interpreter truncates where a GPU rounds
            k, v = k.to(dtype), v.to(dtype)
        store_rows(got, k, v, at, filled)
        reference_store(want, k, v, at)
        check(got, want)
        assert not filled.any()


def test_a_page_filled_block_by_block_has_the_bits_of_one_filled_at_once() -> None:
    blocks, once = (empty_pages(2, 16, 32, torch.float32) for _ in range(2))
    k, filled = torch.randn(16, 2, 32, device=DEVICE), torch.zeros(POOL, dtype=torch.int32, device=DEVICE)
    at = torch.arange(48, 64, device=DEVICE)
    for part in (slice(0, 4), slice(4, 8), slice(8, 16)):
        store_rows(blocks, k[part], k[part], at[part], filled)
    store_rows(once, k, k, at, filled)
    assert blocks.moments is not None and once.moments is not None
    assert torch.equal(blocks.moments[3], once.moments[3])


def test_rows_come_in_any_order() -> None:
    got = empty_pages(2, 8, 32, torch.float32)
    want = copy(got)
    at = torch.tensor([*range(8, 24), *range(40, 45)], device=DEVICE)[torch.randperm(21)]
    k, v = (torch.randn(21, 2, 32, device=DEVICE) for _ in range(2))
    store_rows(got, k, v, at, torch.zeros(POOL, dtype=torch.int32, device=DEVICE))
    reference_store(want, k, v, at)
    check(got, want)


def test_pages_without_summaries_and_stores_without_rows() -> None:
    got = empty_pages(2, 8, 32, torch.float32, bounds=False, moments=False)
    want = copy(got)
    at = torch.tensor([3, 4], device=DEVICE)
    k, v = (torch.randn(2, 2, 32, device=DEVICE) for _ in range(2))
    store_rows(got, k[:0], v[:0], at[:0])
    assert torch.equal(got.k, want.k)
    store_rows(got, k, v, at)
    reference_store(want, k, v, at)
    check(got, want)


def test_what_does_not_fit_is_refused() -> None:
    pages, k = empty_pages(2, 8, 32, torch.float32), torch.zeros(1, 2, 32, device=DEVICE)
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for bounds, moments in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="filled: found None"):
            store_rows(empty_pages(2, 8, 32, torch.float32, bounds, moments), k, k, at)
    with pytest.raises(ValueError, match=r"moments: found torch.bfloat16, allowed: torch.float32"):
        Pages(pages.k, pages.v, None, torch.zeros(POOL, 2, 2, 32, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(ValueError, match=r"moments: found shape \[7, 2, 32\]"):
        Pages(pages.k, pages.v, None, torch.zeros(POOL, 2, 32, device=DEVICE))
    with pytest.raises(ValueError, match=r"k: found shape \[1, 2, 32\], allowed: \[2, 2, 32\]"):
        store_rows(pages, k, k, at.repeat(2))
    with pytest.raises(ValueError, match=r"filled: found torch.int64, allowed: torch.int32"):
        store_rows(pages, k, k, at, torch.zeros(POOL, dtype=torch.int64, device=DEVICE))
