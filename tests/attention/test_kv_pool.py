"""Sizes and shapes of the K/V pool."""

from __future__ import annotations

import torch

from losa_runtime.cache.kv_pool import KVPool, Summary


def test_shapes_and_separate_layers() -> None:
    pool = KVPool(2, 5, 3, 4, 8, torch.bfloat16, "cpu", frozenset({Summary.KEY_BOUNDS}))
    assert pool.k(1).shape == pool.v(0).shape == (5, 3, 4, 8) and pool.k(0).dtype == torch.bfloat16
    assert pool.summary(0, Summary.KEY_BOUNDS).shape == (5, 3, 2, 8)
    pool.k(0).fill_(1.0)
    assert not pool.k(1).any() and not pool.v(0).any()


def test_bytes_are_those_that_are_allocated() -> None:
    sizes = (3, 2, 4, 8, torch.float16, frozenset({Summary.KEY_BOUNDS}))
    pool = KVPool(3, 7, 2, 4, 8, torch.float16, "cpu", frozenset({Summary.KEY_BOUNDS}))
    held = [t for i in range(3) for t in (pool.k(i), pool.v(i), pool.summary(i, Summary.KEY_BOUNDS))]
    assert KVPool.bytes_per_page(*sizes) * 7 == sum(t.nbytes for t in held)
    assert KVPool.bytes_per_token(*sizes) * 4 == KVPool.bytes_per_page(*sizes)


def test_page_bounds_add_one_sixteenth_at_sixteen_tokens() -> None:
    with_bounds = KVPool.bytes_per_page(1, 8, 16, 128, torch.bfloat16, frozenset({Summary.KEY_BOUNDS}))
    assert with_bounds / KVPool.bytes_per_page(1, 8, 16, 128, torch.bfloat16) == 1 + 1 / 16
