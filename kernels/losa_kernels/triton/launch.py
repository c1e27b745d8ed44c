"""Launching a kernel, or noting what would be launched, so that exactly that can be compiled where there is no GPU.

A kernel's parameters are `tl.tensor`: inside, a tensor is the address of its first element and an int a scalar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

Grid: TypeAlias = tuple[int, int, int]


class Launch(NamedTuple):
    """One launch: the kernel, its arguments by name (those of the compiler too), and how it is to be compiled."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int


_noted: list[Launch] | None = None


def launch(kernel: Any, grid: Grid, *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Run `kernel` over a grid of programs; an empty grid runs nothing. Returns before the kernel has run.

    stages: depth of the pipeline of loads in the kernel's loops.
    """
    if _noted is not None:
        _noted.append(Launch(kernel, arguments, warps, stages))
    elif min(grid) > 0:
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Within, launches are noted in the list instead of run; tensors may then lie on the device `meta`."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1: the sizes that tiles can have."""
    return 1 << max(0, number - 1).bit_length()
