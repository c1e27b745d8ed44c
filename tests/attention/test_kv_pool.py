"""Sizes and shapes of the K/V pool."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from losa_runtime.cache import host_memory
from losa_runtime.cache.kv_pool import KVPool, Summary


def test_shapes_and_separate_layers() -> None:
    pool = KVPool(2, 5, 3, 4, 8, torch.bfloat16, "cpu", frozenset(Summary))
    assert pool.k(1).shape == pool.v(0).shape == (5, 3, 4, 8) and pool.k(0).dtype == torch.bfloat16
    for kind, dtype in ((Summary.KEY_BOUNDS, torch.bfloat16), (Summary.KEY_MOMENTS, torch.float32)):
        assert pool.summary(0, kind).shape == (5, 3, 2, 8) and pool.summary(0, kind).dtype == dtype
        pool.summary(1, kind).fill_(2.0)
        assert not pool.summary(0, kind).any()
    pool.k(0).fill_(1.0)
    assert not pool.k(1).any() and not pool.v(0).any()


@pytest.mark.parametrize("kinds", [(), (Summary.KEY_BOUNDS,), (Summary.KEY_MOMENTS,), tuple(Summary)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_those_that_are_allocated(dtype: torch.dtype, kinds: tuple[Summary, ...]) -> None:
    sizes = (3, 2, 4, 8, dtype, frozenset(kinds))
    pool = KVPool(3, 7, 2, 4, 8, dtype, "cpu", frozenset(kinds))
    held = [t for i in range(3) for t in (pool.k(i), pool.v(i), *(pool.summary(i, kind) for kind in kinds))]
    assert KVPool.bytes_per_page(*sizes) * 7 == sum(t.nbytes for t in held)
    assert KVPool.bytes_per_token(*sizes) == -(-KVPool.bytes_per_page(*sizes) // 4)


@pytest.mark.parametrize(
    ("kind", "dtype", "share"),
    [
        (Summary.KEY_BOUNDS, torch.bfloat16, 1 / 16),
        (Summary.KEY_BOUNDS, torch.float32, 1 / 16),
        (Summary.KEY_MOMENTS, torch.bfloat16, 1 / 8),
        (Summary.KEY_MOMENTS, torch.float32, 1 / 16),
    ],
)
def test_what_a_summary_adds_at_sixteen_tokens(kind: Summary, dtype: torch.dtype, share: float) -> None:
    assert KVPool.bytes_per_page(1, 8, 16, 128, dtype, frozenset({kind})) == (
        KVPool.bytes_per_page(1, 8, 16, 128, dtype) * (1 + share)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, host_memory.HUGE // 8, host_memory.HUGE])
def test_host_memory_is_zeroed_and_a_tensor_like_any_other(dtype: torch.dtype, rows: int) -> None:
    x = host_memory.zeros((rows, 2), dtype)
    assert x.shape == (rows, 2) and x.dtype == dtype and x.is_contiguous() and not x.any()
    x[-1, 1] = 3.0
    assert x.sum() == 3.0 and x.data_ptr() % 64 == 0


def test_memory_of_a_large_pool_asks_for_huge_pages() -> None:
    """The system says of each piece of memory what was asked for it: "hg" stands for huge pages."""
    maps = Path("/proc/self/smaps")
    if not maps.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system does not say, or has no huge pages")
    assert hasattr(mmap, "MADV_HUGEPAGE")
    pool = KVPool(1, 64, 8, 16, 128, torch.float32)
    at, inside, flags = pool.k(0).data_ptr(), False, ""
    for line in maps.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= at < last
        elif inside and head == "VmFlags:":
            flags = line
    assert " hg" in flags
