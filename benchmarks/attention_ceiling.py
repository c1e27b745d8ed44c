"""What this machine can do at best: bytes read per second, and multiply-adds per second at the shapes of attention.

Measured with torch, so that no kernel of this project is its own yardstick. The best of several tries each: a ceiling
that a neighbour on the machine had lowered would flatter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

READ_TRIES, GEMM_TRIES = 8, 60
COLUMNS = 1024  # keys per product: the tile stays in the cache, as in a fused kernel


class Ceiling(NamedTuple):
    """read: bytes/s of a buffer much larger than the caches. gemm: FLOP/s by rows of the left factor."""

    read: float
    gemm: dict[int, float]

    def seconds(self, kv_bytes: float, flops: dict[int, float]) -> float:
        """Least time: everything is read once, and computed at the rate of the rows it is computed with."""
        return max(kv_bytes / self.read, sum(count / self.gemm[rows] for rows, count in flops.items()))


def measure(rows: set[int], depth: int, heads: int, buffer_bytes: int, tick: Callable[[], object]) -> Ceiling:
    """rows: of the left factors. depth: head dim. heads: products that run side by side. tick: called per try."""
    return Ceiling(_read(buffer_bytes, tick), {each: _gemm(each, depth, heads, tick) for each in sorted(rows)})


def _best(call: Callable[[], object], tries: int, tick: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    tick()
    return best


def _read(size: int, tick: Callable[[], object]) -> float:
    buffer = torch.ones(size // 4)
    return size / min(_best(call, READ_TRIES, tick) for call in (buffer.sum, buffer.amax))


def _gemm(rows: int, depth: int, heads: int, tick: Callable[[], object]) -> float:
    """The faster of keys as they are stored and of turned ones."""
    left, stored = torch.randn(heads, rows, depth), torch.randn(heads, COLUMNS, depth)
    turned = stored.transpose(1, 2).contiguous()
    best = min(_best(lambda right=right: torch.bmm(left, right), GEMM_TRIES, tick) for right in (stored.mT, turned))  # type: ignore[misc]
    return 2 * heads * rows * depth * COLUMNS / best
