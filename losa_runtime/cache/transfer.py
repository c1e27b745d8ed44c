"""Host values on their way to the device.

A copy of ordinary host memory to a GPU makes the host wait until the device has done all that it was asked before.
From pinned memory the copy is queued like a kernel, and nobody waits. Knows nothing of what the values mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

ALIGNMENT = 2  # int64 numbers in 16 bytes: kernels are compiled for vectors that begin at a multiple of them


def to_device(values: Collection[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values, nested as they are, on the device."""
    return queued(torch.tensor(values, dtype=dtype), device)


def vectors_to_device(vectors: Sequence[ArrayLike], device: torch.device) -> list[Tensor]:
    """int64 vectors on the device, in one copy. On the CPU there is none: the memory of arrays is shared."""
    arrays = [np.asarray(vector, dtype=np.int64) for vector in vectors]
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    rooms = [-(-array.size // ALIGNMENT) * ALIGNMENT for array in arrays]
    padded = [np.pad(array, (0, room - array.size)) for array, room in zip(arrays, rooms, strict=True)]
    together = queued(torch.from_numpy(np.concatenate(padded)), device)
    return [part[: array.size] for part, array in zip(together.split(rooms), arrays, strict=True)]


def queued(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the copy is queued behind what the device was asked before."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
