"""Host memory that is read at scattered places: zeroed, and in huge pages where the system has them.

A list of K/V pages or tokens touches thousands of small pages of the system's; each costs a walk through its page
tables, which on a CPU takes longer than the read itself. Knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE = 2**21  # bytes of a huge page; less than this gains nothing


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zeroed tensor on the CPU. Huge pages are a wish: a system without them serves small ones."""
    size = math.prod(shape) * dtype.itemsize
    wish = getattr(mmap, "MADV_HUGEPAGE", None)
    if wish is None or size < HUGE:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them refuses
        memory.madvise(wish)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
