"""Launching a kernel, or handing the launch to somebody else: to be compiled where there is no GPU, or recorded.

A kernel's parameters are `tl.tensor`: inside, a tensor is the address of its first element and an int a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

Grid: TypeAlias = tuple[int, int, int]


class Launch(NamedTuple):
    """One launch: the kernel, its arguments by name (those of the compiler too), how it is to be compiled, its grid."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    grid: Grid

    def run(self) -> None:
        """Run it once more; an empty grid runs nothing. Returns before the kernel has run."""
        if min(self.grid) > 0:
            self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


_taker: Callable[[Launch], None] = Launch.run


def launch(kernel: Any, grid: Grid, *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Run `kernel` over a grid of programs; an empty grid runs nothing. Returns before the kernel has run.

    stages: depth of the pipeline of loads in the kernel's loops.
    """
    _taker(Launch(kernel, arguments, warps, stages, grid))


@contextmanager
def taken_launches(taker: Callable[[Launch], None]) -> Iterator[None]:
    """Within, `taker` is handed every launch instead of its being run."""
    global _taker
    before, _taker = _taker, taker
    try:
        yield
    finally:
        _taker = before


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Within, launches are noted in the list instead of run; tensors may then lie on the device `meta`."""
    noted: list[Launch] = []
    with taken_launches(noted.append):
        yield noted


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1: the sizes that tiles can have."""
    return 1 << max(0, number - 1).bit_length()
