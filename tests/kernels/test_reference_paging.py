"""Storing, gathering and summarising pages."""

from __future__ import annotations

import torch

from losa_kernels.reference.paging import (
    gather_pages,
    gather_rows,
    key_bounds,
    key_moments,
    position_rows,
    store_rows,
    touched_pages,
)


def test_rows_come_back_from_where_they_were_stored() -> None:
    cache = torch.zeros(4, 2, 3, 5, dtype=torch.bfloat16)
    rows = torch.randn(6, 2, 5)
    pages = torch.tensor([2, 0])
    positions = torch.arange(6)
    store_rows(cache, rows, pages[positions // 3] * 3 + positions % 3)
    kept = rows.to(torch.bfloat16)
    assert torch.equal(gather_pages(cache, pages), kept.transpose(0, 1))
    assert not cache[[1, 3]].any()
    wanted = torch.tensor([[5, 0], [1, 4]])
    got = gather_rows(cache, position_rows(pages, wanted, torch.tensor([1, 0]), 2, 3))
    assert torch.equal(got, torch.stack((kept[wanted[0], 1], kept[wanted[1], 0])))


def test_touched_pages_count_what_is_filled() -> None:
    pages, filled = touched_pages(torch.tensor([8, 9, 10, 11, 4, 5, 30, 31]), 8)
    assert pages.tolist() == [0, 1, 3] and filled.tolist() == [6, 4, 8]


def test_bounds_cover_exactly_the_filled_part() -> None:
    keys = torch.randn(2, 3, 4, 5)
    keys[0, :, 2:] = torch.nan  # never written
    keys[1, :, 1:] = 99.0  # an earlier user's
    bounds = key_bounds(keys, torch.tensor([2, 1]))
    assert torch.equal(bounds[0, :, 0], keys[0, :, :2].amax(1))
    assert torch.equal(bounds[0, :, 1], keys[0, :, :2].amin(1))
    assert torch.equal(bounds[1, :, 0], keys[1, :, 0]) and torch.equal(bounds[1, :, 1], keys[1, :, 0])


def test_moments_are_those_of_the_filled_part() -> None:
    keys = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    keys[0, :, 3:] = torch.nan  # never written
    keys[1, :, 1:] = 99.0  # an earlier user's
    moments, exact = key_moments(keys, torch.tensor([3, 1])), keys[0, :, :3].double()
    assert moments.dtype == torch.float32 and moments.shape == (2, 3, 2, 5)
    torch.testing.assert_close(moments[0, :, 0].double(), exact.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments[0, :, 1].double(), exact.var(1, correction=0), rtol=1e-6, atol=1e-7)
    assert torch.equal(moments[1, :, 0], keys[1, :, 0].float()) and not moments[1, :, 1].any()


def test_moments_of_keys_far_from_zero_do_not_cancel() -> None:
    keys = 1000.0 + torch.randn(1, 1, 16, 8).round(decimals=2)
    [mean, spread] = key_moments(keys, torch.tensor([16]))[0, 0]
    torch.testing.assert_close(mean.double(), keys[0, 0].double().mean(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(spread.double(), keys[0, 0].double().var(0, correction=0), rtol=1e-4, atol=0.0)
