"""What this machine can do at best: bytes read per second, and multiply-adds per second at the shapes of attention.

Measured with torch, so that no kernel of this project is its own yardstick. The best of several tries each: a ceiling
that a neighbour on the machine had lowered would flatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.attention_clock import clock_for

CPU = torch.device("cpu")
DEVICE_PRODUCTS = 64  # per head, so that every processor of a GPU has some
READ_TRIES, GEMM_TRIES = 8, 60
COLUMNS = 1024  # keys per product: the tile stays in the cache, as in a fused kernel


class Ceiling(NamedTuple):
    """read: bytes/s of a buffer much larger than the caches. gemm: FLOP/s by rows of the left factor."""

    read: float
    gemm: dict[int, float]

    def seconds(self, kv_bytes: float, flops: dict[int, float]) -> float:
        """Least time: everything is read once, and computed at the rate of the rows it is computed with."""
        return max(kv_bytes / self.read, sum(count / self.gemm[rows] for rows, count in flops.items()))


class _Machine(NamedTuple):
    """Where and in which numbers products are taken; tick: called per try."""

    device: torch.device
    dtype: torch.dtype
    tick: Callable[[], object]

    def best(self, call: Callable[[], object], tries: int) -> float:
        """Seconds of the fastest of several calls."""
        clock, call_seconds = clock_for(self.device), float("inf")
        for _ in range(tries):
            call_seconds = min(call_seconds, clock.measure(call).seconds)
        self.tick()
        return call_seconds


def measure(
    rows: set[int],
    depth: int,
    heads: int,
    buffer_bytes: int,
    tick: Callable[[], object],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Ceiling:
    """rows: of the left factors. depth: head dim. heads: products that run side by side. tick: called per try."""
    machine = _Machine(device, dtype, tick)
    side_by_side = heads if device.type == "cpu" else heads * DEVICE_PRODUCTS
    return Ceiling(_read(buffer_bytes, machine), {r: _gemm(r, depth, side_by_side, machine) for r in sorted(rows)})


def _read(size: int, machine: _Machine) -> float:
    buffer = torch.ones(size // 4, device=machine.device)
    return size / min(machine.best(call, READ_TRIES) for call in (buffer.sum, buffer.amax))


def _gemm(rows: int, depth: int, heads: int, machine: _Machine) -> float:
    """The faster of keys as they are stored and of turned ones."""
    left, stored = (torch.randn(heads, n, depth, device=machine.device).to(machine.dtype) for n in (rows, COLUMNS))
    turned = stored.transpose(1, 2).contiguous()
    best = min(machine.best(lambda right=right: torch.bmm(left, right), GEMM_TRIES) for right in (stored.mT, turned))  # type: ignore[misc]
    return 2 * heads * rows * depth * COLUMNS / best
