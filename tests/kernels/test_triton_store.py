"""The Triton store against the reference: rows in their places, bounds of the touched pages and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import paging
from losa_kernels.triton.layout import Pages
from losa_kernels.triton.store import store_rows
from tests.kernels.interpreter import DEVICE

POOL = 7


def empty_pages(kv_heads: int, page: int, dim: int, dtype: torch.dtype, bounds: bool = True) -> Pages:
    """Pages of earlier users."""
    shape = (POOL, kv_heads, page, dim)
    k, v = ((torch.randn(shape, device=DEVICE) * 9).to(dtype) for _ in range(2))
    kept = torch.randn(POOL, kv_heads, 2, dim, device=DEVICE).to(dtype) if bounds else None
    return Pages(k, v, kept)


def copy(pages: Pages) -> Pages:
    return Pages(pages.k.clone(), pages.v.clone(), None if pages.bounds is None else pages.bounds.clone())


def reference_store(pages: Pages, k: Tensor, v: Tensor, locations: Tensor) -> None:
    paging.store_rows(pages.k, k, locations)
    paging.store_rows(pages.v, v, locations)
    if pages.bounds is not None:
        touched, filled = paging.touched_pages(locations, pages.k.shape[2])
        pages.bounds[touched] = paging.key_bounds(pages.k[touched], filled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "page", "dim"), [(2, 16, 32), (3, 4, 80), (1, 5, 128)])
def test_rows_and_bounds(kv_heads: int, page: int, dim: int, dtype: torch.dtype) -> None:
    """Three requests: a page from its middle on, whole pages, the first rows of a page. Twice, with one scratch."""
    got = empty_pages(kv_heads, page, dim, dtype)
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
        assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
        assert got.bounds is not None and want.bounds is not None and torch.equal(got.bounds, want.bounds)
        assert not filled.any()


def test_rows_come_in_any_order() -> None:
    got = empty_pages(2, 8, 32, torch.float32)
    want = copy(got)
    at = torch.tensor([*range(8, 24), *range(40, 45)], device=DEVICE)[torch.randperm(21)]
    k, v = (torch.randn(21, 2, 32, device=DEVICE) for _ in range(2))
    store_rows(got, k, v, at, torch.zeros(POOL, dtype=torch.int32, device=DEVICE))
    reference_store(want, k, v, at)
    assert got.bounds is not None and want.bounds is not None and torch.equal(got.bounds, want.bounds)
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)


def test_pages_without_bounds_and_stores_without_rows() -> None:
    got = empty_pages(2, 8, 32, torch.float32, bounds=False)
    want = copy(got)
    at = torch.tensor([3, 4], device=DEVICE)
    k, v = (torch.randn(2, 2, 32, device=DEVICE) for _ in range(2))
    store_rows(got, k[:0], v[:0], at[:0])
    assert torch.equal(got.k, want.k)
    store_rows(got, k, v, at)
    reference_store(want, k, v, at)
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)


def test_what_does_not_fit_is_refused() -> None:
    pages, k = empty_pages(2, 8, 32, torch.float32), torch.zeros(1, 2, 32, device=DEVICE)
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="filled: found None"):
        store_rows(pages, k, k, at)
    with pytest.raises(ValueError, match=r"k: found shape \[1, 2, 32\], allowed: \[2, 2, 32\]"):
        store_rows(pages, k, k, at.repeat(2))
    with pytest.raises(ValueError, match=r"filled: found torch.int64, allowed: torch.int32"):
        store_rows(pages, k, k, at, torch.zeros(POOL, dtype=torch.int64, device=DEVICE))
